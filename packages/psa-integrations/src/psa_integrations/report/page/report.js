"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  const state = {
    prompt: 0, frame: 0, playing: false, speed: 1, amplify: 4,
    run: 1, transformer: "transformer", layer: 0, step: 0, head: 0,
    patch: { t: 0, y: 0, x: 0 }, keyBlock: null, mode: "levels", tint: 0.75, cell: null,
  };
  const runs = () => data.prompts[state.prompt].runs;
  const numFrames = () => data.shown[state.prompt][0].frames.length;

  // ---- small helpers -------------------------------------------------------------------------------------------

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function makeSvg(tag, attributes = {}, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const fixed = (value, digits) => (value === null ? "–" : value.toFixed(digits));
  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
  const seconds = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)) + " s";
  const decibel = (value) => (value === null ? "equal" : `${value.toFixed(2)} dB`);
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

  function median(values) {
    const sorted = [...values].sort((a, b) => a - b);
    const middle = sorted.length >> 1;
    return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  }

  function rgb(colour) {
    return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  }

  /** Sizes a canvas's bitmap to how large it is shown, and returns its context in CSS pixels. */
  function fit(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(width * ratio));
    canvas.height = Math.max(1, Math.round(height * ratio));
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    return context;
  }

  function showTip(event, text) {
    const tip = $("tip");
    if (!text) { tip.hidden = true; return; }
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${clamp(event.clientX + 14, 4, Math.max(4, innerWidth - width - 4))}px`;
    tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
  }

  function tipOn(element, textAt) {
    element.addEventListener("pointermove", (event) => showTip(event, textAt(event)));
    element.addEventListener("pointerleave", (event) => showTip(event, ""));
  }

  /** The run's mark in legends: its colour, its dash and its marker, so that colour is never all. */
  const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
  const MARKERS = ["circle", "square", "triangle", "diamond"];
  const styleOf = (run) => ({
    colour: run === 0 ? "var(--soft)" : `var(--s${(run - 1) % 6})`,
    dash: run === 0 ? "" : DASHES[(run - 1) % DASHES.length],
    marker: run === 0 ? "none" : MARKERS[(run - 1) % MARKERS.length],
  });

  function marker(kind, x, y, colour, size = 3.6) {
    const shapes = {
      circle: () => makeSvg("circle", { cx: x, cy: y, r: size }),
      square: () => makeSvg("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size }),
      triangle: () => makeSvg("polygon", { points: `${x},${y - size - 1} ${x - size - 1},${y + size} ${x + size + 1},${y + size}` }),
      diamond: () => makeSvg("polygon", { points: `${x},${y - size - 1} ${x + size + 1},${y} ${x},${y + size + 1} ${x - size - 1},${y}` }),
      none: () => makeSvg("g"),
    };
    const shape = shapes[kind]();
    shape.setAttribute("class", "mark");
    shape.setAttribute("stroke", colour);
    return shape;
  }

  function keyOf(run) {
    const { colour, dash, marker: kind } = styleOf(run);
    const line = makeSvg("path", { d: "M0 6H26", stroke: colour, "stroke-width": 2, "stroke-dasharray": dash });
    return makeSvg("svg", { class: "key chart", viewBox: "0 0 26 12", width: 26, height: 12, "aria-hidden": "true" }, line, marker(kind, 13, 6, colour));
  }

  // ---- what is packed ------------------------------------------------------------------------------------------

  const unpacked = new Map();
  function unpack(text) {
    if (!unpacked.has(text)) unpacked.set(text, inflate(text));
    return unpacked.get(text);
  }

  async function inflate(text) {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("this browser cannot unpack level maps; one from 2023 or later can");
    }
    const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }

  /** A token order with its inverse: places[token] is where a video token stands, tokens[place] the way back. */
  async function orderOf(index) {
    const order = data.orders[index];
    if (!order.places32) {
      const places = new Uint32Array(await unpack(order.places));
      order.tokens = new Int32Array(order.seq_len).fill(-1);
      places.forEach((place, token) => { order.tokens[place] = token; });
      order.places32 = places;
    }
    return order;
  }

  // ---- pictures ------------------------------------------------------------------------------------------------

  const pixelContext = (width, height) => {
    const canvas = make("canvas");
    canvas.width = width;
    canvas.height = height;
    return canvas.getContext("2d", { willReadFrequently: true });
  };

  /** Decoded frames of the prompt that is shown; those of others are let go. */
  let pictures = [];
  async function loadPictures() {
    const prompt = state.prompt;
    const loaded = await Promise.all(data.shown[prompt].map((shown) => Promise.all(shown.frames.map(async (uri) => {
      const image = new Image();
      image.src = uri;
      await image.decode();
      return image;
    }))));
    if (prompt === state.prompt) pictures = loaded;
  }

  let scratch = null;
  function pixelsOf(run, frame) {
    const { width, height } = data.pictures;
    scratch = scratch || pixelContext(width, height);
    scratch.drawImage(pictures[run][frame], 0, 0);
    return scratch.getImageData(0, 0, width, height);
  }

  const figures = [];
  function buildVideos() {
    const host = $("videos");
    host.classList.toggle("pixels", Math.max(data.pictures.width, data.pictures.height) <= 160);
    const { width, height } = data.pictures;
    host.style.setProperty("--aspect", clamp(width / height, 0.6, 1.8));
    host.replaceChildren();
    figures.length = 0;
    runs().forEach((run, index) => {
      const video = make("canvas", { width, height, role: "img" });
      const caption = make("figcaption", {}, keyOf(index), make("span", {}, run.name));
      if (run.description) caption.title = run.description;
      const under = make("div", { class: index ? "under" : "under dense-side" });
      const figure = { video, difference: null, note: null };
      if (index) {
        figure.difference = make("canvas", { width, height, role: "img" });
        figure.note = make("p", { class: "quiet" });
        under.append(figure.difference, figure.note);
        tipOn(figure.difference, () => figure.note.textContent);
      } else {
        const slider = make("input", { id: "amplify", type: "range", min: 1, max: 20, step: 1, value: state.amplify });
        const value = make("output", { for: "amplify" }, `×${state.amplify}`);
        slider.addEventListener("input", () => {
          state.amplify = Number(slider.value);
          value.textContent = `×${state.amplify}`;
          drawFrame();
        });
        under.append(make("label", { class: "field" }, "Amplify", slider, value));
        under.append(make("p", { class: "quiet" }, "The other pictures of this row are the difference from dense, channel by channel: black is equal."));
      }
      tipOn(video, () => `${run.name}, frame ${state.frame}` + (index ? `\nPSNR ${decibel(run.psnr_per_frame[state.frame])}, SSIM ${fixed(run.ssim_per_frame[state.frame], 4)}` : ""));
      figures.push(figure);
      host.append(make("figure", { class: "run" }, caption, video, under));
    });
    $("pictures-note").textContent = data.pictures.exact
      ? ""
      : `On this page frames are ${width}×${height} pixels and compressed, so faint differences may come from that. The files beside it are of full size.`;
  }

  function drawVideos() {
    const { width, height } = data.pictures;
    let dense = null;
    figures.forEach((figure, index) => {
      figure.video.getContext("2d").drawImage(pictures[index][state.frame], 0, 0);
      figure.video.dataset.frame = state.frame;
      figure.video.setAttribute("aria-label", `${runs()[index].name}, frame ${state.frame} of ${numFrames()}`);
      if (!index) { dense = pixelsOf(0, state.frame); return; }
      const ours = pixelsOf(index, state.frame);
      let sum = 0, most = 0;
      for (let at = 0; at < ours.data.length; at += 4) {
        for (let channel = at; channel < at + 3; channel++) {
          const difference = Math.abs(ours.data[channel] - dense.data[channel]);
          sum += difference;
          most = Math.max(most, difference);
          ours.data[channel] = difference * state.amplify;
        }
      }
      figure.difference.getContext("2d").putImageData(ours, 0, 0);
      figure.difference.setAttribute("aria-label", `Difference of ${runs()[index].name} from dense, amplified ${state.amplify} times`);
      figure.note.textContent = `mean ${(sum / (width * height * 3)).toFixed(1)}, most ${most} of 255`;
    });
  }

  // ---- charts --------------------------------------------------------------------------------------------------

  function ticks(low, high, count) {
    const raw = (high - low || 1) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw) * power;
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(at);
    return { found, step };
  }

  /**
   * Lines over whole numbers. Returns {move(x)}, which moves the mark of where we are.
   * series: [{run, values}], a value may be null; options: title, unit, zero (the axis starts at 0), bands
   * [[first, last]], band (what they are), pick(x), tip(x).
   */
  function lineChart(host, series, options) {
    const width = Math.max(240, host.clientWidth), height = 190;
    const left = 44, right = 12, top = 10, bottom = 24;
    const count = Math.max(...series.map((one) => one.values.length));
    const known = series.flatMap((one) => one.values).filter((value) => value !== null);
    host.replaceChildren(make("figcaption", {}, make("b", {}, options.title), " ", make("span", { class: "quiet" }, options.unit)));
    if (!known.length) {
      host.append(make("p", { class: "notice" }, options.none));
      return { move() {} };
    }
    let low = options.zero ? 0 : Math.min(...known), high = Math.max(...known);
    const margin = (high - low || Math.abs(high) * 0.1 || 1) * 0.08;
    if (!options.zero) low -= margin;
    high = options.most === undefined ? high + margin : Math.min(high + margin, options.most);
    const x = (at) => left + (count > 1 ? (at / (count - 1)) * (width - left - right) : (width - left - right) / 2);
    const y = (value) => top + (1 - (value - low) / (high - low)) * (height - top - bottom);
    const svg = makeSvg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${options.title}. ${options.tip(0)}` });
    for (const [first, last] of options.bands || []) {
      const from = x(Math.max(0, first - 0.5)), to = x(Math.min(count - 1, last + 0.5));
      svg.append(makeSvg("rect", { class: "band", x: from, y: top, width: to - from, height: height - top - bottom }));
      svg.append(makeSvg("text", { x: (from + to) / 2, y: height - bottom - 6, "text-anchor": "middle" }, options.band));
    }
    const { found, step } = ticks(low, high, 4);
    const digits = clamp(Math.ceil(-Math.log10(step) + 0.001 + (step.toPrecision(2).endsWith("5") && step < 1 ? 0.4 : 0)), 0, 5);
    for (const value of found) {
      svg.append(makeSvg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
      svg.append(makeSvg("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(digits)));
    }
    for (const at of ticks(0, count - 1, width < 500 ? 5 : 10).found.filter(Number.isInteger)) {
      svg.append(makeSvg("text", { x: x(at), y: height - 7, "text-anchor": "middle" }, String(at)));
    }
    for (const { run, values } of series) {
      const { colour, dash, marker: kind } = styleOf(run);
      let path = "", pen = "M";
      values.forEach((value, at) => {
        if (value === null) { pen = "M"; return; }
        path += `${pen}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = "L";
      });
      svg.append(makeSvg("path", { d: path, stroke: colour, "stroke-dasharray": dash }));
      // A marker on each value where there is room, and on the lone ones that no line reaches.
      const every = Math.ceil((count * 14) / (width - left - right));
      values.forEach((value, at) => {
        const alone = value !== null && (values[at - 1] ?? null) === null && (values[at + 1] ?? null) === null;
        if (value !== null && (alone || at % every === 0)) svg.append(marker(kind, x(at), y(value), colour));
      });
    }
    const now = makeSvg("line", { class: "now", y1: top, y2: height - bottom });
    if (options.pick) svg.append(now);
    const at = (event) => {
      const box = svg.getBoundingClientRect();
      const place = (((event.clientX - box.left) / box.width) * width - left) / (width - left - right);
      return clamp(Math.round(place * (count - 1)), 0, count - 1);
    };
    tipOn(svg, (event) => options.tip(at(event)));
    if (options.pick) {
      svg.addEventListener("pointerdown", (event) => { svg.setPointerCapture(event.pointerId); options.pick(at(event)); });
      svg.addEventListener("pointermove", (event) => { if (event.buttons) options.pick(at(event)); });
    }
    host.append(svg);
    return { move(place) { now.setAttribute("x1", x(place)); now.setAttribute("x2", x(place)); now.dataset.at = place; } };
  }

  let frameCharts = [];
  function drawFrameCharts() {
    const sparse = runs().map((run, index) => ({ run, index })).slice(1);
    const series = (name) => sparse.map(({ run, index }) => ({ run: index, values: run[name] }));
    const tip = (name, show) => (at) => `frame ${at}\n` + sparse.map(({ run }) => `${run.name}: ${show(run[name][at])}`).join("\n");
    frameCharts = [
      lineChart($("psnr-chart"), series("psnr_per_frame"), { title: "PSNR", unit: "dB, by frame", pick: stopAt, tip: tip("psnr_per_frame", decibel), none: "Every frame equals the dense one: PSNR is infinite." }),
      lineChart($("ssim-chart"), series("ssim_per_frame"), { title: "SSIM", unit: "by frame", most: 1, pick: stopAt, tip: tip("ssim_per_frame", (value) => fixed(value, 4)) }),
    ];
    frameCharts.forEach((chart) => chart.move(state.frame));
    const equal = sparse.filter(({ run }) => run.psnr_per_frame.includes(null)).map(({ run }) => `${run.name} (${run.psnr_per_frame.filter((value) => value === null).length})`);
    $("frames-note").textContent = equal.length ? `Some frames equal the dense ones, where PSNR is infinite and has no point: ${equal.join(", ")}.` : "";
  }

  /** Steps in which all calls of a run were dense. */
  function denseSteps(run) {
    const dense = new Map();
    for (const entry of run.layers) {
      dense.set(entry.step, (dense.get(entry.step) ?? true) && entry.dense_calls === entry.calls);
    }
    return [...dense].filter(([step, all]) => all && step !== null).map(([step]) => step);
  }

  function drawTimeChart() {
    const all = runs().map((run, index) => ({ run, index, dense: new Set(denseSteps(run)) }));
    const sparse = all.slice(1);
    const common = sparse.length ? [...sparse[0].dense].filter((step) => sparse.every((one) => one.dense.has(step))).sort((a, b) => a - b) : [];
    const bands = [];
    for (const step of common) {
      const last = bands[bands.length - 1];
      if (last && last[1] === step - 1) last[1] = step; else bands.push([step, step]);
    }
    const tip = (at) => `step ${at}\n` + all.map(({ run, dense }) => `${run.name}: ${at < run.step_seconds.length ? seconds(run.step_seconds[at]) : "–"}${dense.has(at) ? ", dense" : ""}`).join("\n");
    lineChart($("time-chart"), all.map(({ run, index }) => ({ run: index, values: run.step_seconds })), { title: "Seconds", unit: "by denoising step", zero: true, bands, band: "dense in all", tip, none: "The pipeline reported no steps, so there are no times." });
    const parts = all.map(({ run, dense }) => {
      const counted = run.step_seconds.filter((_, step) => run.dense || !dense.has(step));
      return counted.length ? `${run.name} ${seconds(median(counted))}` : `${run.name}: no such step`;
    });
    $("time-note").textContent = `Median of the sparse steps, and of all steps of dense: ${parts.join(", ")}. First steps may warm up caches or compile. On ${data.device}, ${data.dtype}.`;
  }

  function drawSummary() {
    const head = ["Preset", "Time", "vs dense", "Density", "PSNR", "SSIM"].map((text) => make("th", { scope: "col" }, text));
    const rows = runs().map((run, index) => {
      const name = make("td", {}, keyOf(index), run.name);
      const cells = [
        seconds(run.seconds),
        index ? `${(run.seconds / runs()[0].seconds).toFixed(2)}×` : "–",
        run.density.toFixed(3),
        index ? decibel(run.psnr) : "–",
        index ? run.ssim.toFixed(4) : "–",
      ];
      return make("tr", {}, name, ...cells.map((text) => make("td", {}, text)));
    });
    $("summary").replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  }

  // ---- maps of cells -------------------------------------------------------------------------------------------

  /** Lets a pointer and the arrow keys choose a cell of a canvas. cellAt(x, y) takes CSS pixels in the canvas. */
  function cells(canvas, { cellAt, tip, pick, move }) {
    const here = (event) => {
      const box = canvas.getBoundingClientRect();
      return cellAt(event.clientX - box.left, event.clientY - box.top);
    };
    tipOn(canvas, (event) => { const cell = here(event); return cell ? tip(cell) : ""; });
    canvas.addEventListener("click", (event) => { const cell = here(event); if (cell) pick(cell); });
    const moves = { ArrowLeft: [0, -1, 0], ArrowRight: [0, 1, 0], ArrowUp: [-1, 0, 0], ArrowDown: [1, 0, 0], PageUp: [0, 0, -1], PageDown: [0, 0, 1] };
    canvas.addEventListener("keydown", (event) => {
      if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      move(...moves[event.key]);
    });
  }

  function mix(share) {
    const low = rgb(css("--low")), high = rgb(css("--high"));
    return `rgb(${low.map((value, at) => Math.round(value + share * (high[at] - value))).join(" ")})`;
  }

  let densityMaps = [];
  function buildDensity() {
    densityMaps = [];
    const host = $("density");
    host.replaceChildren();
    runs().forEach((run, index) => {
      if (!index) return;
      for (const transformer of new Set(run.layers.map((entry) => entry.transformer))) {
        const entries = run.layers.filter((entry) => entry.transformer === transformer && entry.step !== null);
        const title = run.name + (transformer === "transformer" ? "" : `, ${transformer}`);
        const figure = make("figure", {}, make("figcaption", {}, make("b", {}, title), " ", make("span", { class: "quiet" }, "layers down, steps across")));
        host.append(figure);
        if (!entries.length) {
          figure.append(make("p", { class: "notice" }, "It is not known which step the calls belonged to, so there is no map."));
          continue;
        }
        const map = {
          index, transformer, title,
          canvas: make("canvas", { tabindex: 0, role: "img", "aria-label": `Density of ${title} by layer and step` }),
          steps: [...new Set(entries.map((entry) => entry.step))].sort((a, b) => a - b),
          layers: [...new Set(entries.map((entry) => entry.layer))].sort((a, b) => a - b),
          entries: new Map(entries.map((entry) => [`${entry.layer} ${entry.step}`, entry])),
          kept: new Set(data.shown[state.prompt][index].maps.filter((one) => one.transformer === transformer).map((one) => `${one.layer} ${one.step}`)),
        };
        map.at = { row: 0, column: 0 };
        const text = ({ row, column }) => {
          const entry = map.entries.get(`${map.layers[row]} ${map.steps[column]}`);
          const where = `${title}, layer ${map.layers[row]}, step ${map.steps[column]}: `;
          if (!entry) return `${where}no call`;
          const dense = entry.dense_calls === entry.calls ? " (ran dense)" : "";
          return `${where}density ${entry.density.toFixed(3)}${dense}${map.kept.has(`${entry.layer} ${entry.step}`) ? "; level map below" : ""}`;
        };
        const pick = (cell) => {
          map.at = cell;
          state.cell = map;
          $("density-readout").textContent = text(cell);
          if (map.kept.has(`${map.layers[cell.row]} ${map.steps[cell.column]}`)) {
            Object.assign(state, { run: index, transformer, layer: map.layers[cell.row], step: map.steps[cell.column] });
            fillChoices();
            drawLevels();
          }
          drawDensity();
        };
        cells(map.canvas, {
          cellAt: (x, y) => {
            const { left, cell, tall } = map.shape;
            const column = Math.floor((x - left) / cell), row = Math.floor(y / tall);
            return row >= 0 && row < map.layers.length && column >= 0 && column < map.steps.length ? { row, column } : null;
          },
          tip: text,
          pick,
          move: (down, right) => pick({ row: clamp(map.at.row + down, 0, map.layers.length - 1), column: clamp(map.at.column + right, 0, map.steps.length - 1) }),
        });
        figure.append(map.canvas);
        densityMaps.push(map);
      }
    });
    if (!densityMaps.length && !host.childElementCount) host.append(make("p", { class: "notice" }, "There is no sparse run."));
    $("density-readout").textContent = "A dot marks a layer and step whose level maps are shown below; choose one.";
  }

  function drawDensity() {
    for (const map of densityMaps) {
      const width = map.canvas.parentElement.clientWidth, left = 24;
      const cell = (width - left) / map.steps.length;
      const tall = clamp(cell, 9, 22);
      map.shape = { left, cell, tall };
      const height = tall * map.layers.length + 18;
      const context = fit(map.canvas, width, height);
      map.canvas.style.height = `${height}px`;
      context.font = "12px system-ui, sans-serif";
      context.fillStyle = css("--soft");
      context.textBaseline = "middle";
      const every = (size, room) => Math.max(1, Math.ceil(room / size));
      map.layers.forEach((layer, row) => {
        if (row % every(tall, 14) === 0) { context.textAlign = "right"; context.fillText(layer, left - 6, (row + 0.5) * tall); }
      });
      map.steps.forEach((step, column) => {
        if (column % every(cell, 30) === 0) { context.textAlign = "center"; context.fillText(step, left + (column + 0.5) * cell, height - 7); }
      });
      const gap = cell > 8 ? 1 : 0;
      map.layers.forEach((layer, row) => map.steps.forEach((step, column) => {
        const entry = map.entries.get(`${layer} ${step}`);
        if (!entry) return;
        context.fillStyle = mix(entry.density);
        context.fillRect(left + column * cell, row * tall, cell - gap, tall - gap);
        if (map.kept.has(`${layer} ${step}`)) {
          const dot = clamp(Math.min(cell, tall) / 5, 1.5, 3);
          context.fillStyle = entry.density > 0.5 ? css("--low") : css("--high");
          context.beginPath();
          context.arc(left + (column + 0.5) * cell - gap / 2, (row + 0.5) * tall - gap / 2, dot, 0, 7);
          context.fill();
        }
      }));
      const chosen = state.run === map.index && state.transformer === map.transformer;
      const row = map.layers.indexOf(state.layer), column = map.steps.indexOf(state.step);
      if (chosen && row >= 0 && column >= 0) outline(context, left + column * cell, row * tall, cell - gap, tall - gap);
      if (state.cell === map) outline(context, left + map.at.column * cell, map.at.row * tall, cell - gap, tall - gap, css("--accent"));
    }
    const scale = $("density-scale").getContext("2d");
    for (let at = 0; at < 256; at++) { scale.fillStyle = mix(at / 255); scale.fillRect(at, 0, 1, 1); }
  }

  /** A frame that shows on any ground: dark on light on dark. */
  function outline(context, x, y, width, height, colour = css("--ink")) {
    context.strokeStyle = css("--page");
    context.lineWidth = 4;
    context.strokeRect(x, y, width, height);
    context.strokeStyle = colour;
    context.lineWidth = 2;
    context.strokeRect(x, y, width, height);
  }

  // ---- level maps ----------------------------------------------------------------------------------------------

  function fill(select, values, chosen, text = String) {
    select.replaceChildren(...values.map((value) => make("option", { value }, text(value))));
    select.value = String(chosen);
    select.disabled = values.length < 2;
  }

  function fillChoices() {
    const sparse = runs().map((_, index) => index).slice(1);
    const run = runs()[state.run];
    const transformers = [...new Set(run.layers.map((entry) => entry.transformer))];
    if (!transformers.includes(state.transformer)) state.transformer = transformers[0] ?? "transformer";
    for (const [name, kept] of [["layer", data.maps.layers], ["step", data.maps.steps], ["head", data.maps.heads]]) {
      if (!kept.includes(state[name])) state[name] = kept[0];
      fill($(`choose-${name}`), kept, state[name]);
    }
    fill($("choose-run"), sparse, state.run, (index) => runs()[index].name);
    fill($("choose-transformer"), transformers, state.transformer);
    $("choose-transformer").parentElement.hidden = transformers.length < 2;
  }

  const currentMap = () => data.shown[state.prompt][state.run].maps.find((one) =>
    one.transformer === state.transformer && one.layer === state.layer && one.step === state.step && one.heads.includes(state.head));

  function whyNoMap() {
    const run = runs()[state.run];
    const entry = run.layers.find((one) => one.transformer === state.transformer && one.layer === state.layer && one.step === state.step);
    const where = `Layer ${state.layer}, step ${state.step} of ${run.name}`;
    if (entry && entry.dense_calls === entry.calls) return `${where} ran dense: every query reads every key at level 1.`;
    if (!entry) return `${where} was never called, so there is no level map.`;
    const left = data.shown[state.prompt][state.run].maps_left_out;
    return left ? `${where} has no level map: ${plural(left, "map")} went beyond the room there was for them.` : `${where}: no level map was kept.`;
  }

  const palette = () => (dark.matches ? data.palette.dark : data.palette.light);

  function levelName(level, map) {
    if (!level) return "skipped";
    const tokens = 2 ** (level - 1);
    if (tokens === map.block_kv) return `one row, the mean of the block's ${tokens}`;
    return tokens === 1 ? "each token by itself" : `means of ${tokens} tokens`;
  }

  /** What is on show: the map, its levels, its token order. */
  let view = null;
  let drawing = 0;
  async function drawLevels() {
    const turn = ++drawing;
    $("levels").setAttribute("aria-busy", "true");
    const map = currentMap();
    let problem = map ? "" : whyNoMap();
    if (map) {
      try {
        const size = map.num_q_blocks * map.num_kv_blocks;
        const levels = new Int8Array(await unpack(map.levels), map.heads.indexOf(state.head) * size, size);
        const order = await orderOf(map.order);
        if (turn !== drawing) return;
        view = { map, levels, order };
      } catch (error) {
        problem = `The level map cannot be shown: ${error.message}.`;
      }
    }
    if (turn !== drawing) return;
    $("levels-missing").hidden = !problem;
    $("levels-missing").textContent = problem;
    $("levels").hidden = Boolean(problem);
    if (problem) view = null;
    else showView();
    $("levels").setAttribute("aria-busy", "false");
  }

  function showView() {
    const { order } = view;
    state.patch = { t: clamp(state.patch.t, 0, order.frames - 1), y: clamp(state.patch.y, 0, order.height - 1), x: clamp(state.patch.x, 0, order.width - 1) };
    view.colours = palette().map(rgb);
    drawLevelMap();
    drawStrip();
    drawLegend();
  }

  const tokenOf = ({ t, y, x }) => (t * view.order.height + y) * view.order.width + x;
  const patchOf = (token) => {
    const { height, width } = view.order;
    return { t: Math.floor(token / (height * width)), y: Math.floor(token / width) % height, x: token % width };
  };
  const queryBlock = (token) => Math.floor(view.order.places32[token] / view.map.block_q);
  const keyBlockOf = (token) => Math.floor(view.order.places32[token] / view.map.block_kv);
  const levelAt = (query, key) => view.levels[query * view.map.num_kv_blocks + key];

  function drawLevelMap() {
    const { map, levels, colours } = view;
    const canvas = $("level-map");
    const width = canvas.parentElement.clientWidth;
    const height = clamp((width * map.num_q_blocks) / map.num_kv_blocks, 40, width * 1.5);
    const context = fit(canvas, width, height);
    canvas.style.height = `${height}px`;
    const picture = pixelContext(map.num_kv_blocks, map.num_q_blocks);
    const image = picture.createImageData(map.num_kv_blocks, map.num_q_blocks);
    levels.forEach((level, at) => image.data.set([...colours[level], 255], at * 4));
    picture.putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(picture.canvas, 0, 0, width, height);
    const wide = width / map.num_kv_blocks, tall = height / map.num_q_blocks;
    if (Math.min(wide, tall) > 7) {
      context.fillStyle = css("--page");
      for (let key = 1; key < map.num_kv_blocks; key++) context.fillRect(key * wide - 0.5, 0, 1, height);
      for (let query = 1; query < map.num_q_blocks; query++) context.fillRect(0, query * tall - 0.5, width, 1);
    }
    view.cell = { wide, tall };
    const query = queryBlock(tokenOf(state.patch));
    outline(context, 1, query * tall, width - 2, tall);
    canvas.setAttribute("aria-label", `Level map, ${map.num_q_blocks} query blocks by ${map.num_kv_blocks} key blocks; query block ${query} is chosen. Up and down choose another.`);
  }

  /** The frame of the video that a frame of tokens shows best: models that compress time keep the first frame alone. */
  const videoFrame = (t) => (view.order.frames < 2 ? 0 : Math.round((t * (numFrames() - 1)) / (view.order.frames - 1)));

  function stripShape(width) {
    const { frames, height, width: across } = view.order;
    const room = width < 480 ? 76 : 104;
    const columns = clamp(Math.floor((width + 6) / (room + 6)), 1, frames);
    const tile = (width - 6 * (columns - 1)) / columns;
    return { columns, tile, tall: (tile * height) / across, rows: Math.ceil(frames / columns), gap: 6, label: 15 };
  }

  /** RGB of what each token is read as in the chosen row, where its level is above 1: the mean over its row's patches. */
  function readColours(query) {
    const { map, order } = view;
    const key = `${state.prompt} ${state.run} ${map.order}`;
    if (view.meansOf !== key) {
      const means = new Float32Array(order.places32.length * 3);
      for (let t = 0; t < order.frames; t++) {
        const { data: pixels, width, height } = pixelsOf(state.run, videoFrame(t));
        for (let y = 0; y < order.height; y++) for (let x = 0; x < order.width; x++) {
          const [y0, y1, x0, x1] = [(y * height) / order.height, ((y + 1) * height) / order.height, (x * width) / order.width, ((x + 1) * width) / order.width].map(Math.floor);
          const token = (t * order.height + y) * order.width + x;
          let count = 0;
          for (let row = y0; row < Math.max(y1, y0 + 1); row++) for (let column = x0; column < Math.max(x1, x0 + 1); column++) {
            for (let channel = 0; channel < 3; channel++) means[token * 3 + channel] += pixels[(row * width + column) * 4 + channel];
            count++;
          }
          for (let channel = 0; channel < 3; channel++) means[token * 3 + channel] /= count;
        }
      }
      view.means = means;
      view.meansOf = key;
    }
    const read = new Float32Array(order.places32.length * 3);
    for (let block = 0; block < map.num_kv_blocks; block++) {
      const level = levelAt(query, block);
      if (level < 2) continue;
      const pool = 2 ** (level - 1), stop = Math.min((block + 1) * map.block_kv, order.seq_len);
      for (let first = block * map.block_kv; first < stop; first += pool) {
        const tokens = Array.from(order.tokens.subarray(first, Math.min(first + pool, stop))).filter((token) => token >= 0);
        if (!tokens.length) continue;
        const mean = [0, 1, 2].map((channel) => tokens.reduce((sum, token) => sum + view.means[token * 3 + channel], 0) / tokens.length);
        for (const token of tokens) read.set(mean, token * 3);
      }
    }
    return read;
  }

  /** The frames with the chosen row of the map on them, all but the mark of the frame that plays. */
  function drawStrip() {
    if (!pictures.length) return;
    const { order } = view;
    const canvas = $("strip");
    const width = canvas.parentElement.clientWidth;
    const shape = view.strip = stripShape(width);
    const height = shape.rows * (shape.tall + shape.label + shape.gap) - shape.gap;
    canvas.style.height = `${height}px`;
    const base = view.base = make("canvas");
    const context = fit(base, width, height);
    fit(canvas, width, height);
    const query = queryBlock(tokenOf(state.patch));
    const ground = groundOf(query);
    const grid = pixelContext(order.width, order.height);
    for (let t = 0; t < order.frames; t++) {
      const { left, top } = tileAt(t);
      context.imageSmoothingEnabled = Math.max(data.pictures.width, data.pictures.height) > 160;
      context.drawImage(pictures[state.run][videoFrame(t)], left, top, shape.tile, shape.tall);
      if (state.mode === "levels") {
        // Grey below the tint, so that its colours stay those of the legend.
        context.globalCompositeOperation = "saturation";
        context.fillStyle = "#808080";
        context.fillRect(left, top, shape.tile, shape.tall);
        context.globalCompositeOperation = "source-over";
      }
      if (state.mode !== "video") {
        const size = order.height * order.width * 4;
        grid.putImageData(new ImageData(ground.subarray(t * size, (t + 1) * size), order.width, order.height), 0, 0);
        context.imageSmoothingEnabled = false;
        context.drawImage(grid.canvas, left, top, shape.tile, shape.tall);
      }
      outlineBlock(context, t, query);
    }
    const { left, top } = tileAt(state.patch.t);
    const x = left + ((state.patch.x + 0.5) * shape.tile) / order.width, y = top + ((state.patch.y + 0.5) * shape.tall) / order.height;
    for (const [colour, radius] of [[css("--page"), 5.5], [css("--accent"), 4]]) {
      context.fillStyle = colour;
      context.beginPath();
      context.arc(x, y, radius, 0, 7);
      context.fill();
    }
    canvas.setAttribute("aria-label", `${order.frames} frames of ${order.width} by ${order.height} patches; patch column ${state.patch.x}, row ${state.patch.y} of frame ${state.patch.t} is chosen`);
    markFrame();
  }

  const tileAt = (t) => {
    const { columns, tile, tall, label, gap } = view.strip;
    return { left: (t % columns) * (tile + gap), top: Math.floor(t / columns) * (tall + label + gap) };
  };

  /** What lies over the patches: RGBA of every token of the video, clear where the video itself shows. */
  function groundOf(query) {
    const { order, colours } = view;
    const ground = new Uint8ClampedArray(order.places32.length * 4);
    if (state.mode === "video") return ground;
    const read = state.mode === "read" ? readColours(query) : null;
    for (let token = 0; token < order.places32.length; token++) {
      const level = levelAt(query, keyBlockOf(token));
      if (read && level === 1) continue;
      const colour = read && level ? read.subarray(token * 3, token * 3 + 3) : colours[level];
      for (let channel = 0; channel < 3; channel++) ground[token * 4 + channel] = colour[channel];
      ground[token * 4 + 3] = read ? 255 : 255 * state.tint;
    }
    return ground;
  }

  /** The border, in one frame, of the patches that share the chosen row of the map. */
  function outlineBlock(context, t, query) {
    const { order, strip } = view;
    const { left, top } = tileAt(t);
    const wide = strip.tile / order.width, tall = strip.tall / order.height;
    const inside = (y, x) => y >= 0 && x >= 0 && y < order.height && x < order.width && queryBlock(tokenOf({ t, y, x })) === query;
    context.beginPath();
    for (let y = 0; y < order.height; y++) for (let x = 0; x < order.width; x++) {
      if (!inside(y, x)) continue;
      const x0 = left + x * wide, y0 = top + y * tall, x1 = x0 + wide, y1 = y0 + tall;
      if (!inside(y - 1, x)) { context.moveTo(x0, y0); context.lineTo(x1, y0); }
      if (!inside(y + 1, x)) { context.moveTo(x0, y1); context.lineTo(x1, y1); }
      if (!inside(y, x - 1)) { context.moveTo(x0, y0); context.lineTo(x0, y1); }
      if (!inside(y, x + 1)) { context.moveTo(x1, y0); context.lineTo(x1, y1); }
    }
    for (const [colour, line] of [[css("--page"), 4], [css("--ink"), 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.stroke();
    }
  }

  /** The numbers below the frames, and a bar at the one that plays. */
  function markFrame() {
    const { order, strip, base } = view;
    const canvas = $("strip"), context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(base, 0, 0, canvas.clientWidth, canvas.clientHeight);
    context.font = "12px system-ui, sans-serif";
    let current = 0;
    for (let t = 0; t < order.frames; t++) if (videoFrame(t) <= state.frame) current = t;
    for (let t = 0; t < order.frames; t++) {
      const { left, top } = tileAt(t);
      const text = order.frames === numFrames() ? `${t}` : `${t} (frame ${videoFrame(t)})`;
      context.fillStyle = css(t === current ? "--ink" : "--soft");
      context.fillText(text, left, top + strip.tall + 13);
      if (t === current) context.fillRect(left + context.measureText(text).width + 5, top + strip.tall + 8, strip.tile - context.measureText(text).width - 5, 2);
    }
  }

  function drawLegend() {
    const { map, levels } = view;
    const query = queryBlock(tokenOf(state.patch));
    const row = levels.subarray(query * map.num_kv_blocks, (query + 1) * map.num_kv_blocks);
    const count = (list, level) => list.reduce((sum, one) => sum + (one === level), 0);
    const used = Array.from({ length: palette().length }, (_, level) => level).filter((level) => level === 0 || level <= 4 ? level <= map.num_levels : count(levels, level));
    used.push(used.shift());
    const share = (list, level) => {
      const found = count(list, level);
      return `${percent(found / list.length)} (${found})`;
    };
    const rows = used.map((level) => {
      const swatch = makeSvg("svg", { class: "swatch", "aria-hidden": "true" }, makeSvg("rect", { width: "100%", height: "100%", fill: palette()[level] }));
      return make("tr", {}, make("td", {}, swatch, level ? `level ${level}` : "skipped"), make("td", {}, level ? levelName(level, map) : "not read at all"), make("td", {}, share(row, level)), make("td", {}, share(levels, level)));
    });
    const head = ["Level", "A block is read as", "This query", "Whole map"].map((text) => make("th", { scope: "col" }, text));
    $("legend").replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
    const cost = (list) => list.reduce((sum, level) => sum + (level ? 2 ** (1 - level) : 0), 0) / list.length;
    const { t, y, x } = state.patch;
    $("levels-readout").textContent =
      `Patch at row ${y}, column ${x} of frame ${t}: query block ${query} of ${map.num_q_blocks}, ${map.block_q} tokens. ` +
      `It reads ${plural(map.num_kv_blocks - count(row, 0), "key block")} of ${map.num_kv_blocks} at ${percent(cost(row))} of the dense work; the whole map takes ${percent(cost(levels))}.`;
  }

  function choosePatch(patch) {
    state.patch = patch;
    drawLevelMap();
    drawStrip();
    drawLegend();
  }

  /** The patch in the middle of a query block, if it holds video. */
  function chooseQuery(query) {
    const first = query * view.map.block_q, stop = Math.min(first + view.map.block_q, view.order.seq_len);
    for (const place of [(first + stop) >> 1, ...Array.from({ length: stop - first }, (_, at) => first + at)]) {
      if (view.order.tokens[place] >= 0) { choosePatch(patchOf(view.order.tokens[place])); return; }
    }
    $("levels-readout").textContent = `Query block ${query} holds text alone, which has no place in the video; it reads every key at level 1.`;
  }

  function setUpLevels() {
    for (const name of ["run", "layer", "step", "head", "transformer"]) {
      $(`choose-${name}`).addEventListener("change", (event) => {
        state[name] = name === "transformer" ? event.target.value : Number(event.target.value);
        fillChoices();
        drawDensity();
        drawLevels();
      });
    }
    for (const radio of document.querySelectorAll("input[name=mode]")) {
      radio.addEventListener("change", () => {
        state.mode = radio.value;
        $("tint-field").hidden = state.mode !== "levels";
        if (view) drawStrip();
      });
    }
    $("tint").addEventListener("input", (event) => { state.tint = event.target.value / 100; if (view) drawStrip(); });
    const keyRange = (key) => `key block ${key} (tokens ${key * view.map.block_kv}–${Math.min((key + 1) * view.map.block_kv, view.order.seq_len) - 1} in order)`;
    cells($("level-map"), {
      cellAt: (x, y) => view && { key: clamp(Math.floor(x / view.cell.wide), 0, view.map.num_kv_blocks - 1), query: clamp(Math.floor(y / view.cell.tall), 0, view.map.num_q_blocks - 1) },
      tip: ({ query, key }) => `query block ${query}, ${keyRange(key)}\n${levelAt(query, key) ? `level ${levelAt(query, key)}: ` : ""}${levelName(levelAt(query, key), view.map)}`,
      pick: ({ query }) => chooseQuery(query),
      move: (down) => { if (view && down) chooseQuery(clamp(queryBlock(tokenOf(state.patch)) + down, 0, view.map.num_q_blocks - 1)); },
    });
    cells($("strip"), {
      cellAt: (x, y) => {
        if (!view) return null;
        const { columns, tile, tall, gap, label } = view.strip;
        const column = Math.floor(x / (tile + gap)), row = Math.floor(y / (tall + label + gap));
        const t = row * columns + column, across = x - column * (tile + gap), down = y - row * (tall + label + gap);
        if (column >= columns || t >= view.order.frames || across >= tile || down >= tall) return null;
        return { t, y: Math.floor((down / tall) * view.order.height), x: Math.floor((across / tile) * view.order.width) };
      },
      tip: (patch) => {
        const key = keyBlockOf(tokenOf(patch)), level = levelAt(queryBlock(tokenOf(state.patch)), key);
        return `frame ${patch.t}, row ${patch.y}, column ${patch.x}: key block ${key}\n${level ? `read at level ${level}: ` : ""}${levelName(level, view.map)}`;
      },
      pick: choosePatch,
      move: (down, right, later) => {
        if (!view) return;
        const { t, y, x } = state.patch;
        choosePatch({ t: clamp(t + later, 0, view.order.frames - 1), y: clamp(y + down, 0, view.order.height - 1), x: clamp(x + right, 0, view.order.width - 1) });
      },
    });
  }

  // ---- playback ------------------------------------------------------------------------------------------------

  function drawFrame() {
    if (!pictures.length) return;
    drawVideos();
    frameCharts.forEach((chart) => chart.move(state.frame));
    $("scrubber").value = state.frame;
    $("scrubber").setAttribute("aria-valuetext", `frame ${state.frame} of ${numFrames()}`);
    const long = make("span", { class: "long" }, "frame ");
    $("frame-number").replaceChildren(long, `${state.frame} / ${numFrames() - 1}`);
    if (view?.base) markFrame();
  }

  function goTo(frame) {
    state.frame = clamp(frame, 0, numFrames() - 1);
    drawFrame();
  }

  /** Stops and goes there: who looks at single frames does not want them to run away. */
  function stopAt(frame) {
    play(false);
    goTo(frame);
  }

  const stepBy = (count) => stopAt((state.frame + count + numFrames()) % numFrames());

  let turn = 0;
  function play(on) {
    state.playing = on;
    $("play").setAttribute("aria-pressed", String(on));
    $("play").setAttribute("aria-label", on ? "Pause" : "Play");
    const mine = ++turn;
    let began = null, first = 0, speed = 0;
    const tick = (now) => {
      if (mine !== turn) return;
      if (speed !== state.speed) { began = now; first = state.frame; speed = state.speed; }
      const due = (first + Math.floor(((now - began) / 1000) * data.fps * speed)) % numFrames();
      if (due !== state.frame) goTo(due);
      requestAnimationFrame(tick);
    };
    if (on) requestAnimationFrame(tick);
  }

  function setUpPlayback() {
    $("play").addEventListener("click", () => play(!state.playing));
    $("back").addEventListener("click", () => stepBy(-1));
    $("forward").addEventListener("click", () => stepBy(1));
    $("scrubber").addEventListener("input", (event) => stopAt(Number(event.target.value)));
    $("speed").addEventListener("change", (event) => { state.speed = Number(event.target.value); });
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const kind = event.target.closest?.("button, select, input, summary") ;
      // Arrows and the ends belong to the sliders and lists that have the focus, space to buttons and lists.
      if (event.key === " " && !(kind && kind.matches("button, select, input[type=radio]"))) { event.preventDefault(); play(!state.playing); return; }
      if (kind && kind.matches("select, input")) return;
      const keys = { ArrowLeft: () => stepBy(-1), ArrowRight: () => stepBy(1), Home: () => stopAt(0), End: () => stopAt(numFrames() - 1) };
      if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
    });
  }

  // ---- the page ------------------------------------------------------------------------------------------------

  async function drawAll() {
    drawFrameCharts();
    drawTimeChart();
    drawDensity();
    drawFrame();
    await drawLevels();
  }

  async function showPrompt(index) {
    state.prompt = index;
    state.run = Math.min(state.run, runs().length - 1);
    state.frame = Math.min(state.frame, numFrames() - 1);
    state.cell = null;
    pictures = [];
    view = null;
    $("prompt").textContent = data.prompts[index].prompt;
    $("scrubber").max = numFrames() - 1;
    buildVideos();
    drawSummary();
    buildDensity();
    fillChoices();
    $("videos").setAttribute("aria-busy", "true");
    try {
      await loadPictures();
    } catch (error) {
      $("pictures-note").textContent = `The frames cannot be shown: ${error.message}`;
    }
    if (state.prompt !== index) return;
    await drawAll();
    $("videos").setAttribute("aria-busy", "false");
  }

  async function start() {
    const size = `${numFrames()} frames of ${data.width}×${data.height}`;
    $("facts").textContent = `${data.model}, seed ${data.seed}, ${size}, ${plural(data.steps, "step")}, guidance ${data.guidance}` + (data.negative_prompt ? `, away from “${data.negative_prompt}”` : "");
    $("program").textContent = `Made by psa compare, ${data.program}.`;
    if (data.prompts.length > 1) {
      $("prompt-choice").hidden = false;
      fill($("prompt-select"), data.prompts.map((_, index) => index), 0, (index) => data.prompts[index].prompt);
      $("prompt-select").addEventListener("change", (event) => showPrompt(Number(event.target.value)));
    }
    const first = data.shown[0].flatMap((shown) => shown.maps)[0];
    if (first) {
      Object.assign(state, { transformer: first.transformer, layer: first.layer, step: first.step, head: first.heads[0] });
      const { frames, height, width } = data.orders[first.order];
      state.patch = { t: frames >> 1, y: height >> 1, x: width >> 1 };
    }
    setUpPlayback();
    setUpLevels();
    await showPrompt(0);
    dark.addEventListener("change", drawAll);
    let width = document.body.clientWidth;
    new ResizeObserver(() => {
      if (document.body.clientWidth !== width) { width = document.body.clientWidth; drawAll(); }
    }).observe(document.body);
    if (!still.matches) play(true);
    document.documentElement.dataset.ready = "true";
  }

  start();
})();
