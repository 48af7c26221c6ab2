"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const sectionData = (anchor) => (data.sections || {})[anchor];

// ---- Small things ------------------------------------------------------------------------------

const make = (tag, attributes = {}, parent = null, text = null) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
};

const draw = (tag, attributes = {}, parent = null, text = null) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
};

const number = (value) => {
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return Number(value.toPrecision(4)).toLocaleString("en");
};

const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)} %`;

const tip = document.getElementById("tip");
const showTip = (event, text) => {
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 16 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${below ? event.clientY + 16 : event.clientY - tip.offsetHeight - 12}px`;
};
const hideTip = () => { tip.hidden = true; };

const placeIn = (svg, event) => {
  const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
  return [(event.clientX - box.left) * view.width / box.width, (event.clientY - box.top) * view.height / box.height];
};

/** Round numbers from low to high, about `count` of them. */
const ticks = (low, high, count) => {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
};

// ---- Line charts -------------------------------------------------------------------------------

const lineChart = (figure, chart) => {
  const width = 420, height = 210, left = 46, right = 10, top = 8, bottom = 22;
  const scale = chart.unit === "%" ? 100 : 1, unit = chart.unit ? ` ${chart.unit}` : "";
  const caption = make("figcaption", {}, figure);
  make("b", {}, caption, chart.title + (chart.unit ? `, ${chart.unit}` : ""));
  const series = chart.series.map((x, i) => ({ ...x, colour: `var(--c${i % 6})`, points: x.points.map(([a, b]) => [a, b * scale]) }));
  for (const { name, colour } of series.length > 1 ? series : []) {
    const entry = make("span", {}, caption);
    make("i", { class: "key", style: `--colour:${colour}` }, entry);
    entry.append(name);
  }
  const all = series.flatMap((x) => x.points);
  const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  const high = Math.max(...ys), low = chart.zoom ? Math.min(...ys) - (high - Math.min(...ys)) * 0.06 : Math.min(...ys, 0), y1 = high > low ? low + (high - low) * 1.06 : low + 1;
  const atX = (x) => left + (x - x0) / (x1 - x0) * (width - left - right);
  const atY = (y) => height - bottom - (y - low) / (y1 - low) * (height - top - bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${chart.title} by step` }, figure);
  for (const y of ticks(low, y1, 4)) {
    draw("line", { class: "grid", x1: left, x2: width - right, y1: atY(y), y2: atY(y) }, svg);
    draw("text", { x: left - 6, y: atY(y) + 4, "text-anchor": "end" }, svg, number(y));
  }
  for (const x of ticks(x0, x1, 5)) draw("text", { x: atX(x), y: height - 5, "text-anchor": "middle" }, svg, number(x));
  for (const { points, colour } of series) {
    const d = points.map(([x, y], i) => `${i ? "L" : "M"}${atX(x).toFixed(1)} ${atY(y).toFixed(1)}`).join("");
    draw("path", { d, fill: "none", stroke: colour, "stroke-width": 1.6, "stroke-linejoin": "round" }, svg);
    if (points.length < 30) for (const [x, y] of points) draw("circle", { cx: atX(x), cy: atY(y), r: 2.4, fill: colour }, svg);
  }
  const cursor = draw("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" }, svg);
  svg.addEventListener("pointermove", (event) => {
    const at = x0 + (placeIn(svg, event)[0] - left) / (width - left - right) * (x1 - x0);
    const nearest = (points) => points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    const step = nearest(all)[0];
    const lines = series.filter((x) => x.points.length).map((x) => [x.name, nearest(x.points)])
      .filter(([, p]) => p[0] === step).map(([name, p]) => `${name}: ${number(p[1])}${unit}`);
    cursor.setAttribute("x1", atX(step));
    cursor.setAttribute("x2", atX(step));
    cursor.setAttribute("visibility", "visible");
    showTip(event, [`step ${step.toLocaleString("en")}`, ...lines].join("\n"));
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); hideTip(); });
};

for (const figure of document.querySelectorAll("[data-chart]")) lineChart(figure, data.charts[figure.dataset.chart]);

// ---- Sortable tables ---------------------------------------------------------------------------

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = make("button", { type: "button" }, null, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const up = before ? before === "descending" : column === 0;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => Number(row.cells[column].dataset.value);
      body.append(...[...body.rows].sort((a, b) => up ? value(a) - value(b) : value(b) - value(a)));
    });
  });
}

// ---- Confusion matrix --------------------------------------------------------------------------

const heatMap = (figure, matrix, names) => {
  const classes = matrix.length, named = classes <= 40;
  const cell = Math.max(460 / classes, 2.5), side = cell * classes;
  const short = (name) => name.length > 14 ? `${name.slice(0, 13)}…` : name;
  const font = Math.min(11, cell * 0.9);
  const margin = named ? Math.max(...names.map((x) => short(x).length)) * font * 0.58 + 10 : 8;
  const rows = matrix.map((row) => row.reduce((a, b) => a + b, 0));
  const columns = names.map((_, k) => matrix.reduce((sum, row) => sum + row[k], 0));
  const share = (i, j, by) => { const whole = by === "row" ? rows[i] : columns[j]; return whole ? matrix[i][j] / whole : 0; };
  const show = (by) => {
    figure.replaceChildren();
    const svg = draw("svg", { viewBox: `0 0 ${margin + side + 2} ${margin + side + 2}`, role: "img", "aria-label": "Confusion matrix: rows are true classes, columns predicted ones" }, figure);
    draw("rect", { class: "frame", x: margin, y: margin, width: side, height: side }, svg);
    if (named) names.forEach((name, k) => {
      const middle = margin + (k + 0.5) * cell;
      draw("text", { class: "name", x: margin - 6, y: middle + font * 0.35, "text-anchor": "end", style: `font-size:${font}px` }, svg, short(name));
      draw("text", { class: "name", transform: `translate(${middle + font * 0.35} ${margin - 6}) rotate(-90)`, style: `font-size:${font}px` }, svg, short(name));
    });
    for (let i = 0; i < classes; i++) for (let j = 0; j < classes; j++) {
      const value = share(i, j, by);
      if (value < 5e-4) continue;
      const x = margin + j * cell, y = margin + i * cell;
      // Square root: most mistakes are a few per cent, and are to be seen.
      draw("rect", { class: i === j ? "right" : "wrong", x, y, width: cell, height: cell, "fill-opacity": Math.sqrt(value).toFixed(3) }, svg);
      if (cell >= 24) draw("text", { class: value > 0.5 ? "value strong" : "name value", x: x + cell / 2, y: y + cell / 2 + 4, "text-anchor": "middle" }, svg, (100 * value).toFixed(value < 0.1 ? 1 : 0));
    }
    svg.addEventListener("pointermove", (event) => {
      const [x, y] = placeIn(svg, event), i = Math.floor((y - margin) / cell), j = Math.floor((x - margin) / cell);
      if (!(i >= 0 && j >= 0 && i < classes && j < classes)) return hideTip();
      const what = i === j ? `${names[i]}, found` : `${names[i]}, taken for ${names[j]}`;
      showTip(event, `${what}\n${percent(share(i, j, "row"), 2)} of the pixels of ${names[i]}\n${percent(share(i, j, "column"), 2)} of what was predicted as ${names[j]}\n${matrix[i][j].toLocaleString("en")} pixels`);
    });
    svg.addEventListener("pointerleave", hideTip);
    make("figcaption", { class: "note" }, figure, "Rows: true classes. Columns: predicted ones. In per cent; the colour grows with the square root.");
  };
  for (const input of document.querySelectorAll("input[name=norm]")) input.addEventListener("change", () => show(input.value));
  show("row");
};

const heat = document.getElementById("heat");
if (heat) heatMap(heat, data.matrix, data.classes);

// ---- Pictures ----------------------------------------------------------------------------------

const unpack = (text, size) => {
  const bytes = atob(text), label = new Uint8Array(size);
  for (let i = 0, at = 0; i < bytes.length; i += 3) {
    const length = bytes.charCodeAt(i + 1) + 256 * bytes.charCodeAt(i + 2);
    label.fill(bytes.charCodeAt(i), at, at += length);
  }
  return label;
};

const loaded = async (url) => { const image = new Image(); image.src = url; await image.decode(); return image; };
const pixelsOf = (image, width, height) => {
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(image, 0, 0, width, height);
  return context.getImageData(0, 0, width, height).data;
};

const view = { opacity: 0.65, hidden: new Set() };
const redraws = [];
const opened = {};
const open = (index) => opened[index] ??= (async () => {
  const stored = data.pictures[index], { width, height } = stored;
  const truth = unpack(stored.truth, width * height), prediction = unpack(stored.prediction, width * height);
  const image = await loaded(stored.image);
  let sure = null;
  if (stored.confidence) sure = pixelsOf(await loaded(stored.confidence), width, height).filter((_, i) => i % 4 === 0);
  return { width, height, truth, prediction, image, sure };
})();

const WRONG = [226, 62, 40], UNSURE = [255, 176, 32], UNLABELLED = [128, 128, 128];
// Panel -> colour and weight of a pixel (0..1, before the slider), and whether the image fades.
const PANELS = {
  image: { title: "image", pixel: () => null },
  truth: { title: "truth", pixel: (p, i) => coloured(p.truth[i]) },
  prediction: { title: "prediction", pixel: (p, i) => coloured(p.prediction[i]) },
  errors: { title: "errors", fades: true, pixel: (p, i) => p.truth[i] >= data.classes.length ? [UNLABELLED, 0.5] : p.truth[i] !== p.prediction[i] ? [WRONG, 1] : null },
  confidence: { title: "doubt: 1 − confidence", fades: true, pixel: (p, i) => [UNSURE, 1 - p.sure[i] / 255] },
};
const coloured = (k) => k < data.classes.length && !view.hidden.has(k) ? [data.palette[k], 1] : null;
const className = (k) => data.classes[k] ?? "not labelled";

const panel = (grid, picture, { title, pixel, fades }) => {
  const { width, height } = picture;
  const box = make("div", { class: "panel" }, grid);
  const canvas = make("canvas", { width, height, role: "img", "aria-label": title }, box);
  if (width < 240) canvas.classList.add("pixels");
  make("span", {}, box, title);
  const layer = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
  const redraw = () => {
    context.drawImage(picture.image, 0, 0, width, height);
    if (fades) { context.fillStyle = `rgb(20 22 26 / ${0.85 * view.opacity})`; context.fillRect(0, 0, width, height); }
    const pixels = new ImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      const found = pixel(picture, i);
      if (found) pixels.data.set([...found[0], 255 * found[1] * (fades ? 1 : view.opacity)], 4 * i);
    }
    layer.getContext("2d").putImageData(pixels, 0, 0);
    context.drawImage(layer, 0, 0);
  };
  canvas.addEventListener("pointermove", (event) => {
    const area = canvas.getBoundingClientRect();
    const x = Math.min(Math.floor((event.clientX - area.left) / area.width * width), width - 1);
    const y = Math.min(Math.floor((event.clientY - area.top) / area.height * height), height - 1);
    const i = Math.max(y, 0) * width + Math.max(x, 0);
    const sure = picture.sure ? `\nconfidence: ${percent(picture.sure[i] / 255, 0)}` : "";
    showTip(event, `truth: ${className(picture.truth[i])}\nprediction: ${className(picture.prediction[i])}${sure}`);
  });
  canvas.addEventListener("pointerleave", hideTip);
  redraws.push(redraw);
  redraw();
};

const showPicture = async (figure) => {
  const picture = await open(figure.dataset.picture);
  const grid = make("div", { class: "panels" }, figure);
  if (figure.dataset.panels === "confusion") {
    const [a, b] = figure.dataset.pair.split(",").map(Number);
    for (const name of ["truth", "prediction"]) panel(grid, picture, PANELS[name]);
    panel(grid, picture, { title: "where", fades: true, pixel: (p, i) => p.truth[i] === a && p.prediction[i] === b ? [WRONG, 1] : null });
  } else {
    for (const name of figure.dataset.panels.split(" ")) if (name !== "confidence" || picture.sure) panel(grid, picture, PANELS[name]);
  }
};

const figures = [...document.querySelectorAll("[data-picture]")];
const ready = Promise.all(figures.map(showPicture));
ready.then(() => { document.documentElement.dataset.ready = "yes"; });

const opacity = document.getElementById("opacity");
if (opacity) {
  let asked = false;
  const redrawAll = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; for (const redraw of redraws) redraw(); });
  };
  opacity.addEventListener("input", () => { view.opacity = opacity.value / 100; redrawAll(); });
  ready.then(async () => {
    const present = new Set();
    for (const picture of await Promise.all(Object.values(opened))) for (const label of [picture.truth, picture.prediction]) for (const k of new Set(label)) present.add(k);
    for (const k of [...present].filter((x) => x < data.classes.length).sort((a, b) => a - b)) {
      const label = make("label", {}, document.getElementById("toggles"));
      const input = make("input", { type: "checkbox", checked: "", "data-class": k }, label);
      make("i", { class: "swatch", style: `background:rgb(${data.palette[k]})` }, label);
      label.append(data.classes[k]);
      input.addEventListener("change", () => { view.hidden[input.checked ? "delete" : "add"](k); redrawAll(); });
    }
  });
}

// ---- Reliability -------------------------------------------------------------------------------

const reliability = document.getElementById("reliability");
if (reliability && data.reliability) {
  const width = 460, height = 330, left = 46, bottom = 34, top = 10, low = 62;
  const bins = data.reliability, size = (width - left - 10) / bins.length, base = height - bottom - low;
  const pixels = bins.reduce((sum, bin) => sum + bin[0], 0);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Share of right pixels by confidence" }, reliability);
  const atY = (y) => base - y * (base - top);
  for (const y of [0, 0.25, 0.5, 0.75, 1]) {
    draw("line", { class: "grid", x1: left, x2: width - 10, y1: atY(y), y2: atY(y) }, svg);
    draw("text", { x: left - 6, y: atY(y) + 4, "text-anchor": "end" }, svg, `${100 * y}`);
    draw("text", { x: left + y * (width - left - 10), y: height - bottom + 16, "text-anchor": "middle" }, svg, `${100 * y}`);
  }
  bins.forEach(([count, right, sum], k) => {
    if (!count) return;
    const x = left + k * size + 1, share = right / count;
    draw("rect", { class: share < sum / count ? "wrong" : "right", "fill-opacity": 0.8, x, width: size - 2, y: atY(share), height: Math.max(base - atY(share), 0.5) }, svg);
    draw("rect", { fill: "var(--dim)", "fill-opacity": 0.55, x, width: size - 2, y: height - bottom - count / pixels * (low - 14), height: Math.max(count / pixels * (low - 14), 0.5) }, svg);
    const area = draw("rect", { fill: "transparent", x: x - 1, width: size, y: top, height: height - bottom - top }, svg);
    area.addEventListener("pointermove", (event) => showTip(event, `confidence ${percent(k / bins.length, 0)} to ${percent((k + 1) / bins.length, 0)}, mean ${percent(sum / count)}\nright: ${percent(share)}\n${percent(count / pixels, 2)} of the pixels`));
    area.addEventListener("pointerleave", hideTip);
  });
  draw("line", { x1: left, y1: atY(0), x2: width - 10, y2: atY(1), stroke: "var(--text)", "stroke-dasharray": "4 4", "pointer-events": "none" }, svg);
  draw("text", { x: width - 10, y: height - 2, "text-anchor": "end" }, svg, "confidence, %");
  make("figcaption", { class: "note" }, reliability, "Above: share of right pixels in per cent. Below: how many pixels have this confidence.");
}
