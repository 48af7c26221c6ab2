// Shows openapi.json to people. Swagger's page would be fetched from another host.

import { get } from "/page/api.js";

function element(kind, words = "", className = "") {
  const made = document.createElement(kind);
  made.textContent = words;
  made.className = className;
  return made;
}

function table(rows) {
  const made = element("table");
  for (const [first, second] of rows) {
    const row = element("tr");
    const head = element("th");
    head.append(element("code", first));
    row.append(head, element("td", second));
    made.append(row);
  }
  return made;
}

function article(method, path, { summary, parameters = [], requestBody, responses }) {
  const made = element("article");
  const title = element("h2");
  title.append(element("code", method.toUpperCase(), "method"), element("code", path));
  made.append(title, element("p", summary));
  if (requestBody) made.append(element("p", requestBody.description, "quiet"));
  const asked = parameters.map(({ name, description, schema }) => {
    const values = schema.enum ? `: ${schema.enum.join(", ")} (default: ${schema.default})` : "";
    return [`?${name}=`, description + values];
  });
  const answered = Object.entries(responses).map(([status, { description, content }]) => [
    status,
    description || Object.keys(content).join(", "),
  ]);
  made.append(table([...asked, ...answered]));
  return made;
}

const api = await get("/openapi.json");
document.getElementById("about").textContent = api.info.description;
document.getElementById("call").textContent =
  `curl --data-binary @photo.jpg '${location.origin}/segment?format=polygons'\n` +
  `curl -F image=@photo.jpg '${location.origin}/segment' -o labels.png`;
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    document.getElementById("paths").append(article(method, path, operation));
  }
}
