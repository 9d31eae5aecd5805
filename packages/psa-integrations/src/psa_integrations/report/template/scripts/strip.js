// One row of a level map, back on the frames of the video.

/** The frame of the video that a frame of tokens shows best: models that compress time keep the first frame alone. */
const videoFrame = (t) => (view.order.frames < 2 ? 0 : Math.round((t * (numFrames() - 1)) / (view.order.frames - 1)));

/** How many frames side by side: the strip is to be about as high as the map and its legend beside it, with few gaps at its end. */
function stripShape(width) {
  const { frames, height, width: across } = view.order;
  const gap = 6, label = 17;
  let best = null;
  for (let columns = 1; columns <= frames; columns++) {
    const tile = (width - gap * (columns - 1)) / columns, tall = (tile * height) / across, rows = Math.ceil(frames / columns);
    if (best && tile < 56) break;
    const off = Math.abs(rows * (tall + label + gap) - 0.92 * width) / width + (0.5 * (rows * columns - frames)) / columns;
    if (!best || off < best.off) best = { off, columns, tile, tall, rows, gap, label };
  }
  $("strip").dataset.columns = best.columns;
  return best;
}

/** RGB means over each token's patch of the video. */
function patchMeans() {
  const { order } = view;
  const means = new Float32Array(order.places32.length * 3);
  for (let t = 0; t < order.frames; t++) {
    const { data: pixels, width, height } = pixelsOf(state.run, videoFrame(t));
    // A patch has a pixel at least, where frames are shown smaller than they are.
    const span = (at, count, size) => [Math.floor((at * size) / count), Math.max(Math.floor(((at + 1) * size) / count), Math.floor((at * size) / count) + 1)];
    for (let y = 0; y < order.height; y++) for (let x = 0; x < order.width; x++) {
      const [y0, y1] = span(y, order.height, height), [x0, x1] = span(x, order.width, width);
      const token = tokenOf({ t, y, x });
      for (let row = y0; row < y1; row++) for (let column = x0; column < x1; column++) {
        for (let channel = 0; channel < 3; channel++) means[token * 3 + channel] += pixels[(row * width + column) * 4 + channel];
      }
      for (let channel = 0; channel < 3; channel++) means[token * 3 + channel] /= (y1 - y0) * (x1 - x0);
    }
  }
  return means;
}

/** RGB of what each token is read as in the chosen row, where its level is above 1: the mean over its row's patches. */
function readColours(query) {
  const { map, order } = view;
  const means = view.means ??= patchMeans();
  const read = new Float32Array(order.places32.length * 3);
  for (let block = 0; block < map.num_kv_blocks; block++) {
    const level = levelAt(query, block);
    if (level < 2) continue;
    const pool = 2 ** (level - 1), stop = Math.min((block + 1) * map.block_kv, order.seq_len);
    for (let first = block * map.block_kv; first < stop; first += pool) {
      const tokens = Array.from(order.tokens.subarray(first, Math.min(first + pool, stop))).filter((token) => token >= 0);
      if (!tokens.length) continue;
      const mean = [0, 1, 2].map((channel) => tokens.reduce((sum, token) => sum + means[token * 3 + channel], 0) / tokens.length);
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
