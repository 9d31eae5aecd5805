// The level map of one layer, step and head.

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
  const where = `Layer ${state.layer}, step ${state.step} of ${isolate(run.name)}`;
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

function drawLegend() {
  const { map, levels } = view;
  const query = queryBlock(tokenOf(state.patch));
  const row = levels.subarray(query * map.num_kv_blocks, (query + 1) * map.num_kv_blocks);
  const count = (list, level) => list.reduce((sum, one) => sum + (one === level), 0);
  const used = Array.from({ length: palette().length }, (_, level) => level).filter((level) => level === 0 || level <= 4 ? level <= map.num_levels : count(levels, level));
  used.push(used.shift());
  const share = (list, level) => {
    const found = count(list, level);
    return [percent(found / list.length), make("span", { class: "count" }, ` (${found})`)];
  };
  const rows = used.map((level) => {
    const swatch = makeSvg("svg", { class: "swatch", "aria-hidden": "true" }, makeSvg("rect", { width: "100%", height: "100%", fill: palette()[level] }));
    return make("tr", {}, make("td", {}, swatch, level ? `level ${level}` : "skipped"), make("td", {}, level ? levelName(level, map) : "not read at all"), make("td", {}, ...share(row, level)), make("td", {}, ...share(levels, level)));
  });
  const head = ["Level", "Read as", "This query", "Whole map"].map((text) => make("th", { scope: "col" }, text));
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
