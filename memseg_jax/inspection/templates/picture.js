(() => {
  const part = document.querySelector('.mem[data-part="memory-picture"]');
  const data = sectionData("memory-picture");
  const board = part.querySelector(".board.asks"), picture = board.querySelector("img");
  const mark = board.querySelector(".mark"), said = board.nextElementSibling;
  const reads = part.querySelector(".reads");
  let row = Math.floor(data.first / data.columns), column = data.first % data.columns;

  const percent = (x) => (100 * x).toFixed(x < 0.1 ? 1 : 0) + " %";
  const draw = (canvas, packed, shape) => {
    const context = canvas.getContext("2d"), bytes = atob(packed), [height, width] = shape;
    const small = new OffscreenCanvas(width, height), pixels = small.getContext("2d").createImageData(width, height);
    for (let i = 0; i < bytes.length; i++) {
      const colour = 3 * bytes.charCodeAt(i);
      pixels.data.set([...data.ramp.slice(colour, colour + 3), 205], 4 * i);
    }
    small.getContext("2d").putImageData(pixels, 0, 0);
    context.filter = "grayscale(1)";
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    context.filter = "none";
    context.imageSmoothingEnabled = true;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    context.lineWidth = 3;
    context.strokeStyle = "#fff";
    const w = canvas.width / data.columns, h = canvas.height / data.rows;
    context.strokeRect(column * w, row * h, w, h);
  };
  const show = () => {
    const cell = data.cells[row * data.columns + column];
    Object.assign(mark.style, {
      left: 100 * column / data.columns + "%", top: 100 * row / data.rows + "%",
      width: 100 / data.columns + "%", height: 100 / data.rows + "%",
    });
    const [best, sure] = cell.says, guess = cell.read.length ? cell.read[0][0] : best;
    said.textContent = "Row " + cell.pixel[0] + ", column " + cell.pixel[1] + ". First guess: " +
      data.names[guess] + "; after reading the memory: " + data.names[best] + " (" + percent(sure) + ")";
    reads.replaceChildren(...cell.read.flatMap(([k, weight]) => {
      const name = document.createElement("span"), bar = document.createElement("i"), share = document.createElement("span");
      name.textContent = data.names[k];
      bar.style.width = 100 * weight + "%";
      bar.style.background = data.colours[k];
      share.textContent = percent(weight);
      return [name, bar, share];
    }));
    for (const canvas of part.querySelectorAll("canvas")) {
      const kind = canvas.dataset.kind;
      draw(canvas, cell[kind].map, data.shapes[kind]);
      part.querySelector(`output[data-kind="${kind}"]`).textContent =
        "The brightest place counts " + cell[kind].peak + " times an even share.";
    }
  };
  board.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect();
    row = Math.min(Math.max(Math.floor((event.clientY - box.top) / box.height * data.rows), 0), data.rows - 1);
    column = Math.min(Math.max(Math.floor((event.clientX - box.left) / box.width * data.columns), 0), data.columns - 1);
    show();
  });
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  board.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    row = Math.min(Math.max(row + move[0], 0), data.rows - 1);
    column = Math.min(Math.max(column + move[1], 0), data.columns - 1);
    show();
  });
  picture.decode().catch(() => {}).then(show);
})();
