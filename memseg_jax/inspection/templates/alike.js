(() => {
  const part = document.querySelector('.mem[data-part="memory-alike"]');
  const data = sectionData("memory-alike");
  const said = part.querySelector("output");
  for (const svg of part.querySelectorAll("svg")) {
    const picture = svg.querySelector("image");
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect(), n = data.names.length;
      const place = (at, start, size) =>
        Math.min(Math.max(Math.floor((at - start) / size * n), 0), n - 1);
      const row = place(event.clientY, box.top, box.height);
      const column = place(event.clientX, box.left, box.width);
      const alike = data.similarity[row][column], taken = data.confusion[row][column];
      const share = taken === null ? "has no pixel in this split" :
        (100 * taken).toFixed(1) + " % of its pixels are taken for " + (row === column ? "itself" : data.names[column]);
      said.textContent = data.names[row] + " and " + data.names[column] + ": similarity " +
        alike.toFixed(2) + "; " + data.names[row] + ": " + share;
    });
  }
})();
