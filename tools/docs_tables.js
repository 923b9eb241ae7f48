// On a phone a table of four columns or more is a list: each row a block, each cell beside the name of its column (docs.css).
document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("article table").forEach(table => {
  const heads = [...table.querySelectorAll("thead tr")].map(row => [...row.children]);
  if (!heads.length || heads[0].length < 4 || heads.flat().some(o => o.colSpan > 1)) return;
  const names = heads[0].map((_, i) => heads.map(row => row[i] ? row[i].innerText.trim() : "").join(" ").trim());
  table.classList.add("listed");
  table.querySelectorAll("tbody tr").forEach(row => [...row.children].forEach((o, i) => o.dataset.name = names[i]));
}));
