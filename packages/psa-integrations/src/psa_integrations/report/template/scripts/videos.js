// The videos and their differences from dense.

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
  host.style.setProperty("--count", runs().length);
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
      under.append(make("p", { class: "quiet" }, "With each preset: its difference from dense, channel by channel. Black is equal, the numbers are of 255."));
    }
    tipOn(video, () => `${isolate(run.name)}, frame ${state.frame}` + (index ? `\nPSNR ${decibel(run.psnr_per_frame[state.frame])}, SSIM ${fixed(run.ssim_per_frame[state.frame], 4)}` : ""));
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
    figure.video.setAttribute("aria-label", `${isolate(runs()[index].name)}, frame ${state.frame} of ${numFrames()}`);
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
    figure.difference.setAttribute("aria-label", `Difference of ${isolate(runs()[index].name)} from dense, amplified ${state.amplify} times`);
    figure.note.textContent = `mean ${(sum / (width * height * 3)).toFixed(1)}, most ${most}`;
  });
}
