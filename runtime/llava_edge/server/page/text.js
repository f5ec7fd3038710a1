// A model's answer as elements. Only textContent is ever set, so whatever stands in it stays text.

function element(name, options = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

const INLINE = /(`[^`\n]+`)|(\*\*[^*\n]+\*\*)|(\*[^*\s][^*\n]*\*)/;

function inline(text) {
  const nodes = [];
  while (text) {
    const found = INLINE.exec(text);
    if (!found) break;
    if (found.index) nodes.push(text.slice(0, found.index));
    const marks = found[2] ? 2 : 1;
    const name = found[1] ? "code" : found[2] ? "strong" : "em";
    nodes.push(element(name, {}, found[0].slice(marks, -marks)));
    text = text.slice(found.index + found[0].length);
  }
  if (text) nodes.push(text);
  return nodes;
}

function lines(text) {
  return text.split("\n").flatMap((line, index) => (index ? [element("br"), ...inline(line)] : inline(line)));
}

function block(text) {
  const rows = text.split("\n");
  const heading = /^#{1,6}\s+(.*)$/.exec(text);
  if (heading) return element("h3", {}, ...inline(heading[1]));
  if (rows.every((row) => /^\s*[-*•]\s+/.test(row)))
    return element("ul", {}, ...rows.map((row) => element("li", {}, ...inline(row.replace(/^\s*[-*•]\s+/, "")))));
  if (rows.every((row) => /^\s*\d+[.)]\s+/.test(row)))
    return element("ol", { start: Number.parseInt(rows[0], 10) }, ...rows.map((row) => element("li", {}, ...inline(row.replace(/^\s*\d+[.)]\s+/, "")))));
  return element("p", {}, ...lines(text));
}

function rendered(text) {
  const parts = text.split(/^```[^\n]*\n?/m);
  return parts.flatMap((part, index) =>
    index % 2
      ? [element("pre", {}, element("code", {}, part.replace(/\n$/, "")))]
      : part.split(/\n{2,}/).filter((each) => each.trim()).map((each) => block(each.replace(/^\n+|\n+$/g, ""))));
}
