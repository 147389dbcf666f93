"use strict";
/* Heads of tables sort their rows, a field filters them, selections hide what does not fit. Without this script the page
   shows everything in its first order. */
const number = (text) => {
  const found = text.replace(/,/g, "").replace(/\u2212/g, "-").match(/^[^\d\w-]*(-?[\d.]+(?:e[+-]?\d+)?)/i);
  return found && !Number.isNaN(Number(found[1])) ? Number(found[1]) : null;
};
const compare = (a, b, order) => {
  const [x, y] = [number(a), number(b)];
  if (x !== null && y !== null) return (x - y) * order;
  if (x !== null || y !== null) return x === null ? 1 : -1; // what is no number comes last, whichever way it is sorted
  return a.localeCompare(b, undefined, { numeric: true }) * order;
};
const key = (row, column) => {
  const cell = row.cells[column];
  return cell ? cell.dataset.value ?? cell.textContent.trim() : "";
};
function sort(head) {
  const body = head.closest("table").tBodies[0];
  const falling = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const column = head.cellIndex;
  const rows = [...body.rows].sort((a, b) => compare(key(a, column), key(b, column), falling ? -1 : 1));
  body.append(...rows);
}
for (const table of document.querySelectorAll("table.sorts")) {
  for (const head of table.tHead.rows[0].cells) {
    head.setAttribute("aria-sort", "none");
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head));
    head.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      sort(head);
    });
  }
  const tools = table.parentElement.previousElementSibling;
  if (!tools || !tools.matches(".tools.of-table")) continue;
  tools.hidden = false;
  tools.querySelector("input").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.classList.toggle("unmatched", !words.every((word) => text.includes(word)));
    }
  });
}
/* The Pareto front of what is visible: of each series, the marks that no cheaper mark beats. */
function front(panel) {
  const sign = panel.dataset.better === "right" ? -1 : 1;
  const down = panel.dataset.lower === undefined ? 1 : -1; // pixels grow downwards: high figures have low places
  for (const line of panel.querySelectorAll(".front")) {
    const points = [...panel.querySelectorAll("[data-front]:not([hidden])")]
      .filter((mark) => mark.dataset.method === line.dataset.method)
      .map((mark) => mark.dataset.front.split(" ").map(Number))
      .sort((a, b) => sign * (a[0] - b[0]) || down * (a[1] - b[1]));
    let best = Infinity;
    const kept = points.filter((point) => down * point[1] < best && ((best = down * point[1]), true));
    line.setAttribute("d", kept.length > 1 ? "M" + kept.map((point) => point.join(" ")).join("L") : "");
  }
}
for (const tools of document.querySelectorAll(".tools.of-page")) {
  tools.hidden = false;
  const apply = () => {
    const wanted = [...tools.querySelectorAll("select")].filter((one) => one.value).map((one) => [one.name, one.value]);
    for (const one of document.querySelectorAll("[data-method]:not(.front), [data-facet]")) {
      one.toggleAttribute("hidden", !wanted.every(([name, value]) => (one.dataset[name] ?? value).split("|").includes(value)));
    }
    document.querySelectorAll("[data-better]").forEach(front);
  };
  tools.addEventListener("change", apply);
  apply();
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
