const sectionData = (anchor) => JSON.parse(document.getElementById("data").textContent)[anchor];
