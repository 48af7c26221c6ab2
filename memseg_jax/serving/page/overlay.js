// A picture with the class of every pixel over it, on two canvases.

const TINY = 3; // times that a picture is enlarged from which its pixels are shown as squares

export class Overlay {
  /**
   * @param {HTMLElement} box holds both canvases, and takes the picture's shape.
   * @param {HTMLCanvasElement} photo
   * @param {HTMLCanvasElement} overlay
   */
  constructor(box, photo, overlay) {
    Object.assign(this, { box, photo, overlay, width: 0, height: 0, values: null });
  }

  /** Shows a picture that has no classes yet. */
  showPhoto(bitmap) {
    this.values = null;
    this.width = bitmap.width;
    this.height = bitmap.height;
    for (const canvas of [this.photo, this.overlay]) {
      canvas.width = bitmap.width;
      canvas.height = bitmap.height;
    }
    this.box.style.setProperty("--wide", bitmap.width);
    this.box.style.setProperty("--high", bitmap.height);
    this.photo.getContext("2d").drawImage(bitmap, 0, 0);
    this.box.classList.toggle("tiny", this.box.clientWidth > TINY * bitmap.width);
  }

  /**
   * Takes the classes of the picture's pixels.
   * @param {Blob} png red is the class id, green the confidence times 255.
   * @returns {Promise<number[]>} pixels per class id.
   */
  async showClasses(png) {
    const exact = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
    const bitmap = await createImageBitmap(png, exact);
    if (bitmap.width !== this.width || bitmap.height !== this.height) {
      throw new Error("The result is of another size than the picture.");
    }
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    this.values = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
    const counts = new Array(256).fill(0);
    for (let at = 0; at < this.values.length; at += 4) counts[this.values[at]]++;
    return counts;
  }

  /**
   * Draws the colours of some classes.
   * @param {number[][]} colors red, green and blue of every class id.
   * @param {boolean[]} shown which classes are drawn.
   */
  draw(colors, shown) {
    const table = new Uint32Array(256); // little endian: alpha, blue, green, red
    colors.forEach(([red, green, blue], k) => {
      if (shown[k]) table[k] = ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
    });
    const image = new ImageData(this.width, this.height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let at = 0; at < pixels.length; at++) pixels[at] = table[this.values[4 * at]];
    this.overlay.getContext("2d").putImageData(image, 0, 0);
  }

  /**
   * Draws where a pixel looks, from nothing to the place that counts most.
   * @param {number[][]} weights rows of the attention's map.
   */
  drawAttention(weights) {
    const [high, wide] = [weights.length, weights[0].length];
    const most = Math.max(...weights.map((row) => Math.max(...row)));
    const small = new OffscreenCanvas(wide, high);
    const pixels = new ImageData(wide, high);
    weights.flat().forEach((weight, at) => {
      pixels.data.set([255, 196, 64, 255 * (weight / most)], 4 * at);
    });
    small.getContext("2d").putImageData(pixels, 0, 0);
    const context = this.overlay.getContext("2d");
    context.clearRect(0, 0, this.width, this.height);
    context.drawImage(small, 0, 0, this.width, this.height);
  }

  /** The pixel under a place of the window, [row, column]. */
  pixelAt(clientX, clientY) {
    const box = this.photo.getBoundingClientRect();
    return this.within([
      Math.floor(((clientY - box.top) / box.height) * this.height),
      Math.floor(((clientX - box.left) / box.width) * this.width),
    ]);
  }

  /** The pixel of the picture that is nearest to a place. */
  within([row, column]) {
    const clamp = (value, side) => Math.min(Math.max(value, 0), side - 1);
    return [clamp(row, this.height), clamp(column, this.width)];
  }

  /** Class id and confidence 0..1 of a pixel. */
  valueAt([row, column]) {
    const at = 4 * (row * this.width + column);
    return [this.values[at], this.values[at + 1] / 255];
  }

  /** Puts a mark at a pixel's centre. */
  place(mark, [row, column]) {
    mark.style.left = `${(100 * (column + 0.5)) / this.width}%`;
    mark.style.top = `${(100 * (row + 0.5)) / this.height}%`;
    mark.hidden = false;
  }

  /** Puts a note beside a pixel, on the side where there is more room. */
  placeBeside(note, [row, column]) {
    const [outer, inner] = [note.offsetParent ?? this.box.parentElement, this.box].map((x) =>
      x.getBoundingClientRect(),
    );
    const x = inner.left - outer.left + (inner.width * (column + 0.5)) / this.width;
    const y = inner.top - outer.top + (inner.height * (row + 0.5)) / this.height;
    const [right, below] = [column < this.width / 2, row < this.height / 2];
    note.style.left = right ? `${x + 14}px` : "auto";
    note.style.right = right ? "auto" : `${outer.width - x + 14}px`;
    note.style.top = below ? `${y + 14}px` : "auto";
    note.style.bottom = below ? "auto" : `${outer.height - y + 14}px`;
    note.hidden = false;
  }

  /** What is seen, at the picture's own size, as a PNG. */
  flattened(opacity) {
    const canvas = new OffscreenCanvas(this.width, this.height);
    const context = canvas.getContext("2d");
    context.drawImage(this.photo, 0, 0);
    context.globalAlpha = opacity;
    context.drawImage(this.overlay, 0, 0);
    return canvas.convertToBlob({ type: "image/png" });
  }
}
