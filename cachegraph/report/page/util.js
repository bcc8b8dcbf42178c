"use strict";
// Everything that a report shows is text: names of modules, files and prompts are never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const plan = data.plan;

/** An element; children are elements or text, null ones are left out. */
function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
function s(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined) element.append(child);
  }
  return element;
}

function scaled(count, base, units) {
  let unit = 0;
  while (Math.abs(count) >= base - 0.5 && unit < units.length - 1) {
    count /= base;
    unit += 1;
  }
  const digits = unit === 0 || count >= 99.95 ? 0 : count >= 9.995 ? 1 : 2;
  return count.toFixed(digits) + units[unit];
}

const amount = (count) => scaled(count, 1000, ["", " k", " M", " G", " T", " P", " E"]);
const size = (count) => scaled(count, 1024, [" B", " KiB", " MiB", " GiB", " TiB", " PiB"]);
const seconds = (t) => (t >= 1 ? t.toFixed(2) + " s" : (t * 1000).toFixed(t < 0.01 ? 2 : 0) + " ms");
const percent = (part, whole) => (whole ? ((100 * part) / whole).toFixed(1) + " %" : "0 %");
const plural = (count, word) => (count === 1 ? `1 ${word}` : `${count} ${word}s`);
const total = (numbers) => numbers.reduce((sum, one) => sum + one, 0);

/** Rising numbers as words: "0 3-9 12". */
function ranges(numbers) {
  const words = [];
  for (let i = 0; i < numbers.length; ) {
    let last = i;
    while (numbers[last + 1] === numbers[last] + 1) last += 1;
    words.push(last - i >= 2 ? `${numbers[i]}-${numbers[last]}` : numbers.slice(i, last + 1).join(" "));
    i = last + 1;
  }
  return words.join(" ");
}

/** Names that differ in numbers alone as one: blocks.0-27.attn; others with commas. */
function common(names) {
  const families = new Map();
  for (const name of names) {
    const key = name.replace(/\d+/g, "*");
    families.set(key, [...(families.get(key) || []), name]);
  }
  return [...families.values()].map(commonOfFamily).join(", ");
}

function commonOfFamily(names) {
  if (names.length === 1) return names[0];
  const pieces = names.map((name) => name.split(/(\d+)/));
  return pieces[0].map((piece, place) => {
    if (place % 2 === 0) return piece;
    const numbers = [...new Set(pieces.map((found) => +found[place]))].sort((a, b) => a - b);
    return ranges(numbers).replace(/ /g, ",");
  }).join("");
}

/** Puts other children in place of those of an element. */
const replace = (element, ...children) => { element.replaceChildren(); fill(element, null, children); };

/** What is grouped under equal keys, in order of first appearance. */
function grouped(items, key) {
  const groups = new Map();
  for (const item of items) {
    const at = key(item);
    if (!groups.has(at)) groups.set(at, []);
    groups.get(at).push(item);
  }
  return groups;
}

const watcher = new ResizeObserver((found) => {
  for (const target of new Set(found.map((one) => one.target.closest("[role=group]")))) {
    if (!target) continue;
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});

/** What may be wider than the page scrolls by itself, by keyboard too. */
function wide(label, child, kind) {
  const made = h("div", { class: kind || "wide", role: "group", "aria-label": label }, child);
  watcher.observe(made);
  watcher.observe(child);
  return made;
}

/** A table with headings; cells that are numbers in headings ending with "#" stand to the right. */
function table(caption, headings, rows, kind) {
  const right = headings.map((one) => one.endsWith("#"));
  const cell = (tag, value, i) => h(tag, { class: right[i] ? "number" : null, scope: tag === "th" ? "col" : null }, value);
  return wide(caption || headings.join(", ").replaceAll("#", ""),
    h("table", { class: kind || "list" },
      caption ? h("caption", { class: "faint" }, caption) : null,
      h("thead", null, h("tr", null, headings.map((one, i) => cell("th", one.replace("#", ""), i)))),
      h("tbody", null, rows.map((row) => h("tr", null, row.map((value, i) => cell("td", value, i)))))));
}

const MARKS = {
  r: ["m-r", "reads the cache"],
  w: ["m-w", "kept for later"],
  k: ["m-k", "known beforehand"],
  s: ["m-s", "columns sliced"],
  t: ["m-t", "chosen tokens only"],
};

const variantOf = (step) => data.variants[plan.variant_of[step]];
