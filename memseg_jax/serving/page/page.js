// The page: takes a picture, shows its classes, and answers about its pixels.

import { get, post, Refusal } from "/page/api.js";
import { connectCamera } from "/page/camera.js";
import { Overlay } from "/page/overlay.js";

const TOP = 5; // classes that are listed for a pixel
const find = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;

const overlay = new Overlay(find("picture"), find("photo"), find("overlay"));
let model = null; // what the server says about itself
let file = null; // the picture, and the name for downloads
let shown = []; // whether each class is drawn
let attention = null; // by kind, the maps of the pixel that was asked about
let pointer = [0, 0]; // the keyboard's pixel
let work = new AbortController(); // what is under way for this picture
let question = new AbortController(); // about a pixel

// ---- What the user is told ----

function say(text, wrong = false) {
  const status = find("status");
  status.textContent = text;
  status.classList.toggle("wrong", wrong);
  status.hidden = !text;
}

function complain(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof Refusal)) console.error(error);
  say(error.message, true);
}

// ---- A picture comes in ----

async function open(blob, name) {
  work.abort();
  question.abort();
  const mine = (work = new AbortController());
  say("");
  if (blob.size > model.max_megabytes * 1e6) {
    const size = (blob.size / 1e6).toFixed(1);
    return say(`The file has ${size} MB. This server takes ${model.max_megabytes} MB at most.`, true);
  }
  document.body.classList.add("busy");
  try {
    const bitmap = await createImageBitmap(blob).catch(() => null);
    if (bitmap && bitmap.width * bitmap.height <= model.max_megapixels * 1e6) {
      if (mine.signal.aborted) return;
      begin(bitmap);
    }
    say("Segmenting …");
    const answer = await post("/segment?format=values", blob, mine.signal, say);
    if (!bitmap) throw new Refusal("The browser cannot show this kind of file. PNG or JPEG will do.");
    const counts = await overlay.showClasses(await answer.blob());
    mine.signal.throwIfAborted();
    file = { blob, name };
    finish(counts);
    say("");
  } catch (error) {
    if (mine === work) complain(error);
  } finally {
    if (mine === work) document.body.classList.remove("busy");
  }
}

/** Shows the picture while its classes are being computed. */
function begin(bitmap) {
  file = null;
  find("panel").hidden = true;
  find("empty").hidden = true;
  find("view").hidden = false;
  find("pin").hidden = find("pointer").hidden = find("tip").hidden = true;
  overlay.showPhoto(bitmap);
}

function finish(counts) {
  listClasses(counts);
  pointer = [Math.floor(overlay.height / 2), Math.floor(overlay.width / 2)];
  find("look").hidden = find("reads").hidden = true;
  find("look-hint").hidden = false;
  attention = null;
  find("here-name").textContent = "Point at the picture";
  find("here-name").className = "quiet";
  find("here-confidence").textContent = find("here-color").style.background = "";
  find("panel").hidden = false;
  draw();
}

function connectInputs() {
  for (const input of [find("file"), find("shot")]) {
    input.addEventListener("change", () => {
      if (input.files[0]) open(input.files[0], input.files[0].name);
      input.value = ""; // the same file may be chosen again
    });
  }
  find("choose").addEventListener("click", () => find("file").click());
  document.addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files].find((x) => x.type.startsWith("image/"));
    if (pasted) open(pasted, pasted.name);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    const dropped = event.dataTransfer.files[0];
    if (dropped) open(dropped, dropped.name);
  });
}

function listExamples() {
  for (let number = 0; number < model.examples; number++) {
    const button = document.createElement("button");
    const image = document.createElement("img");
    button.type = "button";
    image.src = `/examples/${number}`;
    image.alt = `Example ${number + 1}`;
    button.append(image);
    button.addEventListener("click", async () => {
      const answer = await fetch(image.src);
      open(await answer.blob(), `example_${number + 1}.png`);
    });
    find("examples").append(button);
  }
  find("examples").hidden = !model.examples;
}

// ---- Classes and opacity ----

function draw() {
  const layer = document.querySelector("[name=layer]:checked").value;
  const looks = attention?.[layer];
  find("picture").classList.toggle("attention", Boolean(looks));
  if (looks) overlay.drawAttention(looks);
  else overlay.draw(model.classes.map((x) => x.color), shown);
  const any = shown.some(Boolean);
  find("all").textContent = any ? "Hide all" : "Show all";
  find("all").setAttribute("aria-pressed", any);
}

function listClasses(counts) {
  const pixels = overlay.width * overlay.height;
  const present = model.classes.filter((x) => counts[x.class_id]);
  present.sort((a, b) => counts[b.class_id] - counts[a.class_id]);
  shown = model.classes.map(() => true);
  find("classes").replaceChildren(
    ...present.map(({ class_id: k, name, color }) => {
      const [item, label, box] = ["li", "label", "input"].map((x) => document.createElement(x));
      Object.assign(box, { type: "checkbox", checked: true });
      box.dataset.classId = k;
      box.addEventListener("change", () => {
        shown[k] = box.checked;
        draw();
      });
      const swatch = text("swatch", "");
      swatch.style.background = `rgb(${color})`;
      label.append(box, swatch, text("name", name), text("number", percent(counts[k] / pixels)));
      item.append(label);
      return item;
    }),
  );
}

function text(kind, words) {
  const span = document.createElement("span");
  span.className = kind;
  span.textContent = words;
  return span;
}

function connectPanel() {
  find("all").addEventListener("click", () => {
    const any = shown.some(Boolean);
    shown.fill(!any);
    for (const box of find("classes").querySelectorAll("input")) box.checked = !any;
    draw();
  });
  find("opacity").addEventListener("input", () => {
    find("overlay").style.opacity = find("opacity").value / 100;
    find("opacity-shown").textContent = `${find("opacity").value}%`;
  });
  find("layers").addEventListener("change", draw);
  for (const button of document.querySelectorAll("[data-save]")) {
    button.addEventListener("click", () => save(button.dataset.save).catch(complain));
  }
}

async function save(kind) {
  if (!file) return;
  const { blob, name } = file;
  let content;
  if (kind === "overlay") {
    content = await overlay.flattened(find("opacity").value / 100);
  } else {
    content = await (await post(`/segment?format=${kind}`, blob, work.signal, say)).blob();
    say("");
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  const ending = kind === "overlay" || kind === "png" ? "png" : "json";
  link.download = `${name.replace(/\.\w+$/, "")}_${kind}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// ---- Pixels ----

/** Says what a pixel is, in the panel and beside it. */
function show(pixel) {
  const [k, confidence] = overlay.valueAt(pixel);
  const { name, color } = model.classes[k];
  const swatch = text("swatch", "");
  swatch.style.background = `rgb(${color})`;
  const tip = find("tip");
  tip.replaceChildren(swatch, text("", name), text("number", percent(confidence)));
  overlay.placeBeside(tip, pixel);
  find("here-color").style.background = `rgb(${color})`;
  find("here-name").textContent = name;
  find("here-name").className = "";
  find("here-confidence").textContent = percent(confidence);
}

async function ask(pixel) {
  question.abort();
  question = new AbortController();
  overlay.place(find("pin"), pixel);
  const [row, column] = pixel;
  try {
    const path = `/look?row=${row}&column=${column}`;
    const answer = await (await post(path, file.blob, question.signal, say)).json();
    const bar = ({ class_id: k, name, probability, weight }) => {
      const [item, meter] = ["li", "meter"].map((x) => document.createElement(x));
      meter.value = probability ?? weight;
      meter.className = "class-colored";
      meter.style.setProperty("--bar", `rgb(${model.classes[k].color})`);
      meter.setAttribute("aria-hidden", "true");
      item.append(text("name", name), text("number", percent(meter.value)), meter);
      return item;
    };
    find("look").replaceChildren(...answer.classes.slice(0, TOP).map(bar));
    find("look").hidden = false;
    find("look-hint").hidden = true;
    find("reads").hidden = !answer.rows;
    find("read").replaceChildren(...(answer.rows ?? []).slice(0, TOP).map(bar));
    attention = answer.attention;
    for (const input of document.querySelectorAll("[name=layer]")) {
      input.disabled = input.value !== "classes" && !attention?.[input.value];
    }
    draw();
    say("");
  } catch (error) {
    complain(error);
  }
}

function connectPicture() {
  const picture = find("picture");
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  picture.addEventListener("pointermove", (event) => {
    if (!file) return;
    find("pointer").hidden = true;
    show((pointer = overlay.pixelAt(event.clientX, event.clientY)));
  });
  for (const end of ["pointerleave", "blur"]) {
    picture.addEventListener(end, () => (find("tip").hidden = true));
  }
  picture.addEventListener("click", (event) => {
    if (!file) return;
    show((pointer = overlay.pixelAt(event.clientX, event.clientY)));
    ask(pointer);
  });
  picture.addEventListener("keydown", (event) => {
    if (!file) return;
    const step = steps[event.key];
    if (step) {
      const size = event.shiftKey ? 10 : 1;
      pointer = overlay.within([pointer[0] + size * step[0], pointer[1] + size * step[1]]);
      overlay.place(find("pointer"), pointer);
      show(pointer);
    } else if (event.key === "Enter" || event.key === " ") {
      ask(pointer);
    } else {
      return;
    }
    event.preventDefault();
  });
}

// ---- Start ----

try {
  model = await get("/model");
  find("model").textContent = `${model.name}, ${model.classes.length} classes`;
  listExamples();
  connectInputs();
  connectPanel();
  connectPicture();
  connectCamera(find, open, (words) => say(words, true));
  document.body.dataset.ready = "";
} catch (error) {
  complain(error);
}
