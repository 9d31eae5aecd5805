// Curves over frames and steps, and the table of numbers.

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
    svg.append(makeSvg("text", { x: from + 5, y: height - bottom - 6 }, options.band));
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

const NO_SPARSE = "There is no sparse run.";

let frameCharts = [];
function drawFrameCharts() {
  const sparse = runs().map((run, index) => ({ run, index })).slice(1);
  const series = (name) => sparse.map(({ run, index }) => ({ run: index, values: run[name] }));
  const tip = (name, show) => (at) => `frame ${at}\n` + sparse.map(({ run }) => `${isolate(run.name)}: ${show(run[name][at])}`).join("\n");
  frameCharts = [
    lineChart($("psnr-chart"), series("psnr_per_frame"), { title: "PSNR", unit: "dB, by frame", pick: stopAt, tip: tip("psnr_per_frame", decibel), none: sparse.length ? "Every frame equals the dense one: PSNR is infinite." : NO_SPARSE }),
    lineChart($("ssim-chart"), series("ssim_per_frame"), { title: "SSIM", unit: "by frame", most: 1, pick: stopAt, tip: tip("ssim_per_frame", (value) => fixed(value, 4)), none: NO_SPARSE }),
  ];
  frameCharts.forEach((chart) => chart.move(state.frame));
  const equal = sparse.filter(({ run }) => run.psnr_per_frame.includes(null)).map(({ run }) => `${isolate(run.name)} (${run.psnr_per_frame.filter((value) => value === null).length})`);
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
  const tip = (at) => `step ${at}\n` + all.map(({ run, dense }) => `${isolate(run.name)}: ${at < run.step_seconds.length ? seconds(run.step_seconds[at]) : "–"}${dense.has(at) ? ", dense" : ""}`).join("\n");
  lineChart($("time-chart"), all.map(({ run, index }) => ({ run: index, values: run.step_seconds })), { title: "Seconds", unit: "by denoising step", zero: true, bands, band: "dense in all", tip, none: "The pipeline reported no steps, so there are no times." });
  const parts = all.map(({ run, dense }) => {
    const counted = run.step_seconds.filter((_, step) => run.dense || !dense.has(step));
    return counted.length ? `${isolate(run.name)} ${seconds(median(counted))}` : `${isolate(run.name)}: no such step`;
  });
  $("time-note").textContent = `Median of the sparse steps, and of all steps of dense: ${parts.join(", ")}. First steps may warm up caches or compile. On ${data.device}, ${data.dtype}.`;
}

function drawSummary() {
  const head = ["Preset", "Time", "Speed-up", "Density", "PSNR", "SSIM"].map((text) => make("th", { scope: "col" }, text));
  const rows = runs().map((run, index) => {
    const name = make("td", {}, keyOf(index), run.name);
    const cells = [
      seconds(run.seconds),
      index ? `${(runs()[0].seconds / run.seconds).toFixed(2)}×` : "–",
      run.density.toFixed(3),
      index ? (run.psnr === null ? "equal" : run.psnr.toFixed(2)) : "–",
      index ? run.ssim.toFixed(3) : "–",
    ];
    return make("tr", {}, name, ...cells.map((text) => make("td", {}, text)));
  });
  const keys = runs().map((run, index) => make("span", {}, keyOf(index), run.name));
  $("time-keys").replaceChildren(...keys);
  $("frames-keys").replaceChildren(...keys.slice(1).map((key) => key.cloneNode(true)));
  $("summary").replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}
