(() => {
  const drawings = '.mem[data-part="memory-holding"] svg, .mem[data-part="memory-map"] svg';
  for (const svg of document.querySelectorAll(drawings)) {
    svg.addEventListener("pointerover", (event) => {
      const found = event.target.closest("[data-k]");
      svg.classList.toggle("faded", Boolean(found));
      for (const item of svg.querySelectorAll("[data-k]"))
        item.classList.toggle("on", Boolean(found) && item.dataset.k === found.dataset.k);
    });
    svg.addEventListener("pointerleave", () => svg.classList.remove("faded"));
  }
})();
