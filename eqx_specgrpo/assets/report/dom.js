"use strict";

// Elements are made here, and text goes into them as text: nothing that a run holds is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function shape(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

// A table that scrolls by itself where it is wider than the screen; `header` are the titles of its columns.
function table(header, rows, caption) {
  const head = element("tr", {}, ...header.map((title) => element("th", { scope: "col" }, title)));
  return element(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)),
  );
}

// `cells[0]` names the row.
function row(cells, attributes = {}) {
  const [first, ...others] = cells;
  return element(
    "tr",
    attributes,
    element("th", { scope: "row" }, first),
    ...others.map((cell) => element("td", {}, cell)),
  );
}

function section(title, ...children) {
  const id = title.toLowerCase().replace(/\W+/g, "-");
  return element("section", { id, "aria-labelledby": `${id}-title` }, element("h2", { id: `${id}-title` }, title), ...children);
}

// A mark of a run's or a line's color, and its name.
function swatch(color, label) {
  return element("span", { class: "key" }, element("span", { class: `swatch c${color % 8}`, "aria-hidden": "true" }), label);
}
