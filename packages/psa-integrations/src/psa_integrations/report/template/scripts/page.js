// Playback, and the page as a whole.

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
    const kind = event.target.closest?.("button, select, input");
    // Arrows and the ends belong to the sliders and lists that have the focus, space to buttons and lists.
    if (event.key === " " && !(kind && kind.matches("button, select, input[type=radio]"))) { event.preventDefault(); play(!state.playing); return; }
    if (kind && kind.matches("select, input")) return;
    const keys = { ArrowLeft: () => stepBy(-1), ArrowRight: () => stepBy(1), Home: () => stopAt(0), End: () => stopAt(numFrames() - 1) };
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
}

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
  const size = `${plural(numFrames(), "frame")} of ${data.width}×${data.height}`;
  $("facts").textContent = `${data.model}, seed ${data.seed}, ${size}, ${plural(data.steps, "step")}, guidance ${data.guidance}` + (data.negative_prompt ? `, away from “${isolate(data.negative_prompt)}”` : "");
  if (data.missing_videos) {
    $("missing").hidden = false;
    $("missing").textContent = `The run was cut short: ${plural(data.missing_videos, "video")} of it ${data.missing_videos === 1 ? "is" : "are"} missing here.`;
  }
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
