// Maps of density by layer and step.

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

/** The colours of densities in the page's present scheme: a function of a share from 0 to 1. */
function shades() {
  const low = rgb(css("--low")), high = rgb(css("--high"));
  return (share) => `rgb(${low.map((value, at) => Math.round(value + share * (high[at] - value))).join(" ")})`;
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
      const title = isolate(run.name) + (transformer === "transformer" ? "" : `, ${transformer}`);
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
  if (!densityMaps.length && !host.childElementCount) host.append(make("p", { class: "notice" }, NO_SPARSE));
  $("density-readout").textContent = densityMaps.length ? "A dot marks a layer and step whose level maps are shown below; choose one." : "";
}

function drawDensity() {
  const mix = shades(), low = mix(0), high = mix(1);
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
        context.fillStyle = entry.density > 0.5 ? low : high;
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
