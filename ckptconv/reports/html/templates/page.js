"use strict";
// Searches the table of the keys. Words must all be in a row; "a|b" is a word with alternatives.
// "#find=WORDS" in the address searches as well: the boxes of the drawings are such links.
const input = document.getElementById("find");
const table = document.querySelector("table.keys");

function start() {
  const rows = Array.from(table.tBodies[0].rows, (row) => [row, row.textContent.toLowerCase()]);

  function search() {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = words.map((word) => word.split("|"));
    let found = 0;
    for (const [row, text] of rows) {
      row.hidden = !wanted.every((word) => word.some((part) => text.includes(part)));
      found += !row.hidden;
    }
    table.classList.toggle("searched", words.length > 0);
    const count = `${found.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
    document.getElementById("count").textContent = words.length ? count : "";
  }

  function follow() {
    const words = new URLSearchParams(location.hash.slice(1)).get("find");
    if (words === null) return;
    input.value = words;
    search();
    document.getElementById("keys").scrollIntoView();
    input.focus({ preventScroll: true });
  }

  document.getElementById("search").hidden = false;
  input.addEventListener("input", search);
  window.addEventListener("hashchange", follow);
  follow();
}

if (input) start(); // a folder that was verified alone has no table
