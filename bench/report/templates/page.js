"use strict";
// Headers sort their table: rising, falling, as it was.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = Array.from(body.rows);
  const headers = Array.from(table.tHead.rows[0].cells);
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" };
      const direction = next[header.getAttribute("aria-sort") || "none"];
      for (const other of headers) other.removeAttribute("aria-sort");
      if (direction !== "none") header.setAttribute("aria-sort", direction);
      table.classList.toggle("sorted", direction !== "none");
      const sign = direction === "descending" ? -1 : 1;
      const key = (row) => row.cells[column].dataset.order;
      const rows = direction === "none" ? original : Array.from(original).sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        // What is unknown stays last.
        if (x === "" || y === "") return (x === "") - (y === "");
        const [p, q] = [Number(x), Number(y)];
        return sign * (Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q);
      });
      body.append(...rows);
    });
  });
}
