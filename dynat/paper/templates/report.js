// Sorting, filtering and two methods side by side. Without it the page is complete, and it computes nothing:
// it moves, hides and copies what the page says. The address keeps the view: #setting=digits&method=dynat.
"use strict";

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const the = (id) => document.getElementById(id);
const pairs = JSON.parse(the("pairs-data").textContent);
const tables = new Map(all(".part").map((part) => [part.id, all("table", part)[0]]));
const rows = all(".part tbody tr");
const settings = distinct(rows.map((row) => row.dataset.setting).filter(Boolean));
const methods = distinct(rows.flatMap(methodsOf));
let view; // setting, methods, pair: [its setting, first, second], sorted: id of a table -> [column, direction]
let opener; // the link that opened the sheet of a number

function distinct(items) {
  return [...new Set(items)];
}

function methodsOf(row) {
  return row.dataset.methods?.split(" ") ?? [];
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ---------------------------------------------------------------------------------------------- the address

/** The view as the fragment of an address; an id has no "=", so that no other fragment is taken for one. */
function fragment() {
  const words = new URLSearchParams();
  if (view.setting) words.append("setting", view.setting);
  for (const method of view.methods) words.append("method", method);
  if (view.pair.slice(1).some(Boolean)) words.append("pair", view.pair.join("/"));
  for (const [id, how] of view.sorted) words.append("sort", [id, ...how].join("/"));
  return words.toString();
}

/** The view that a fragment names, without what this page does not have. */
function read(text) {
  const words = new URLSearchParams(text);
  const known = (names, name) => (names.includes(name) ? name : "");
  const [setting, ...both] = words.get("pair")?.split("/") ?? [];
  const of = known(distinct(pairs.map((each) => each.setting)), setting) || (pairs[0]?.setting ?? "");
  const sort = words.getAll("sort").map((each) => each.split("/"));
  const headed = sort.filter(([id, column, direction]) =>
    known(["ascending", "descending"], direction) && tables.get(id)?.tHead.rows[0].cells[Number(column)]);
  return {
    setting: known(settings, words.get("setting")),
    methods: methods.filter((method) => words.getAll("method").includes(method)),
    pair: [of, ...[0, 1].map((place) => known(compared(of), both[place]))],
    sorted: new Map(headed.map(([id, column, direction]) => [id, [Number(column), direction]])),
  };
}

function changed(message) {
  history.replaceState(null, "", `#${fragment()}`);
  show(message);
}

// ---------------------------------------------------------------------------------------------- sorting

/** What a cell says, without interval and marks of footnotes. */
function textOf(cell) {
  const copy = cell.cloneNode(true);
  all("sup, small", copy).forEach((each) => each.remove());
  return copy.textContent.trim();
}

/** The number that a text begins with, or that follows its colon. */
function numberIn(text) {
  const found = /(?:^|: )([+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)/.exec(text);
  return found ? Number(found[1].replaceAll(",", "")) : NaN;
}

/** Rows that stay together, in the order of the page: one with a label and those below it that have none. */
function groupsOf(table) {
  const groups = [];
  for (const row of table.tBodies[0].rows) {
    if (row.classList.contains("first") || !groups.length) groups.push([]);
    groups.at(-1).push(row);
  }
  return groups;
}

/** The groups by a column of their first rows: numbers by their value, what has none at the end. */
function sorted(groups, column, direction) {
  const texts = groups.map(([row]) => textOf(row.cells[column]));
  const numbers = texts.map(numberIn);
  const numeric = 2 * numbers.filter(Number.isFinite).length > texts.filter(Boolean).length;
  const missing = (i) => (numeric ? Number.isNaN(numbers[i]) : !texts[i]);
  const ascending = (i, j) => (numeric ? numbers[i] - numbers[j] : texts[i].localeCompare(texts[j], "en"));
  const sign = direction === "ascending" ? 1 : -1;
  const order = [...groups.keys()].sort((i, j) => missing(i) - missing(j) || sign * (ascending(i, j) || 0));
  return order.map((i) => groups[i]);
}

function sortable(id, table) {
  const groups = groupsOf(table);
  for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
    if (!head.textContent.trim()) continue;
    const button = make("button", { type: "button" }, ...head.childNodes);
    button.addEventListener("click", () => {
      const [now, direction] = view.sorted.get(id) ?? [];
      const next = now !== column ? "ascending" : direction === "ascending" ? "descending" : "";
      view.sorted.delete(id);
      if (next) view.sorted.set(id, [column, next]);
      changed(`Sorted by ${textOf(head)}: ${next || "as it was"}.`);
    });
    head.append(button);
  }
  return () => {
    const [column, direction] = view.sorted.get(id) ?? [];
    for (const [place, head] of [...table.tHead.rows[0].cells].entries()) {
      if (place === column) head.setAttribute("aria-sort", direction);
      else head.removeAttribute("aria-sort");
    }
    const wanted = (direction ? sorted(groups, column, direction) : groups).flat();
    const present = table.tBodies[0].rows;
    if (wanted.some((row, i) => row !== present[i])) table.tBodies[0].append(...wanted); // moving takes the focus away
  };
}

// ---------------------------------------------------------------------------------------------- filtering

/** Hides the rows about other settings and methods; those about none of either stay. */
function filter() {
  for (const row of rows) {
    const of = methodsOf(row);
    const method = !view.methods.length || !of.length || of.some((each) => view.methods.includes(each));
    row.hidden = !method || Boolean(view.setting && (row.dataset.setting ?? view.setting) !== view.setting);
  }
  const nothingOf = (parts) => parts.length > 0 && parts.every((part) => part.hidden);
  for (const part of all(".part")) part.hidden = nothingOf(all("tbody tr", part));
  for (const section of all("main > section:not(#tools)")) {
    section.hidden = nothingOf(all(".part", section));
    all(`nav a[href="#${section.id}"]`).forEach((link) => (link.parentElement.hidden = section.hidden));
  }
  the("setting").value = view.setting;
  all("#methods input").forEach((box) => (box.checked = view.methods.includes(box.value)));
  the("chosen").textContent = view.methods.join(", ") || "all";
}

// ---------------------------------------------------------------------------------------------- two methods

/** The methods of a setting that can be laid side by side. */
function compared(setting) {
  return distinct(pairs.filter((each) => each.setting === setting).flatMap((each) => Object.keys(each.sheets)));
}

const negative = (text) => (Number(text) ? (text[0] === "-" ? "+" : "-") + text.slice(1) : text);

/** A cell with a number and what stands behind it; the number opens a sheet if there is one. */
function cell(text, sheet) {
  const [value, ...rest] = text.split(" ");
  return make("td", {}, sheet ? make("a", { href: `#${sheet.id}` }, value) : value, make("small", {}, rest.join(" ")));
}

/** Both accuracies under an attack, and the difference in the order that was chosen. */
function attackRow(group, first, second) {
  const sheets = [first, second].map((method) => the(group.sheets[method]));
  const accuracies = sheets.map((sheet) => cell(sheet?.querySelector("strong").textContent ?? "", sheet));
  const forth = group.pairs.find(([a, b]) => a === first && b === second);
  const back = group.pairs.find(([a, b]) => a === second && b === first);
  const [difference, low, high, ...rest] = (forth ?? back ?? []).slice(2);
  const [gap, from, to] = forth ? [difference, low, high] : [difference, high, low].map(negative);
  const texts = forth || back ? [`${gap} [${from}, ${to}]`, ...rest] : ["", "", "", ""];
  const head = make("th", { scope: "row" }, group.column);
  return make("tr", { className: "first" }, head, ...accuracies, ...texts.map((text) => cell(text)));
}

function sideBySide() {
  const [setting, ...both] = view.pair;
  the("pair-setting").value = setting;
  for (const [place, id] of ["first", "second"].entries()) {
    const options = compared(setting).map((method) => make("option", { value: method }, method));
    the(id).replaceChildren(make("option", { value: "" }, "choose"), ...options);
    the(id).value = both[place];
  }
  the("pair").hidden = !both.every(Boolean);
  if (the("pair").hidden || the("pair").dataset.of === view.pair.join()) return;
  the("pair").dataset.of = view.pair.join();
  const heads = ["Attack", ...both, "Difference", "p", "p (Holm)", "n"];
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)));
  const groups = pairs.filter((each) => each.setting === setting);
  const body = make("tbody", {}, ...groups.map((group) => attackRow(group, ...both)));
  the("pair").replaceChildren(make("table", {}, make("thead", {}, head), body));
}

// ---------------------------------------------------------------------------------------------- the page

const order = [...tables].map(([id, table]) => sortable(id, table));

function show(message) {
  order.forEach((each) => each());
  filter();
  sideBySide();
  const visible = rows.filter((row) => !row.hidden).length;
  the("status").textContent = `${visible} of ${rows.length} rows. ${message}`;
}

function start() {
  const options = (names) => names.map((name) => make("option", { value: name }, name));
  the("setting").append(...options(settings));
  the("pair-setting").append(...options(distinct(pairs.map((each) => each.setting))));
  for (const method of methods) {
    const box = make("input", { type: "checkbox", value: method });
    the("methods").append(make("label", {}, box, method));
  }
  the("tools").addEventListener("change", () => {
    view.setting = the("setting").value;
    view.methods = all("#methods input:checked").map((box) => box.value);
    const known = compared(the("pair-setting").value);
    const both = ["first", "second"].map((id) => the(id).value).map((each) => (known.includes(each) ? each : ""));
    view.pair = [the("pair-setting").value, ...both];
    changed(both.every(Boolean) ? `${both.join(" and ")} side by side.` : "");
  });
  the("reset").addEventListener("click", () => {
    view = read("");
    changed("");
  });
  the("comparison").hidden = !pairs.length;
  the("tools").hidden = false;
}

/** Closing a sheet goes back to the view and to the number that opened it. */
function close(event, link) {
  event.preventDefault();
  location.hash = fragment() || link.hash;
  opener?.focus();
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (link?.hash.startsWith("#a-")) opener = link;
  else if (link?.className === "close") close(event, link);
});
document.addEventListener("keydown", (event) => {
  const link = event.key === "Escape" && document.querySelector(".audit:target .close");
  if (link) close(event, link);
});
window.addEventListener("hashchange", () => {
  if (!location.hash.includes("=")) return;
  view = read(location.hash.slice(1));
  show("");
});

view = read(location.hash.includes("=") ? location.hash.slice(1) : "");
start();
show("");
