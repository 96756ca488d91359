// The page is read without it: it adds the filter of the modules, and of the rows of the table.
(() => {
  const search = document.querySelector(".search");
  if (!search) return;
  const box = document.getElementById("filter"), found = document.getElementById("found");
  const items = [...document.querySelectorAll(".tree li[data-name]")];
  const rows = [...document.querySelectorAll("#all tbody tr")];
  const folds = items.map((item) => item.firstElementChild);
  let before = null;

  function show(item, words) {
    // A module is shown where it is meant itself, or something in it is.
    const inner = [...item.querySelectorAll(":scope > details > ul > li[data-name]")];
    const shown = inner.map((child) => show(child, words)).some((x) => x);
    const meant = words.every((word) => item.dataset.name.includes(word));
    item.hidden = !(shown || meant);
    if (words.length) item.firstElementChild.open = shown;
    return !item.hidden;
  }

  function filter() {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length && !before) before = folds.map((fold) => fold.open);
    for (const item of document.querySelectorAll(".tree > li")) show(item, words);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    if (!words.length && before) {
      folds.forEach((fold, i) => { fold.open = before[i]; });
      before = null;
    }
    const left = items.filter((item) => !item.hidden && item.querySelector(":scope > details > .quantities")).length;
    found.textContent = words.length ? `${left} ${left === 1 ? "layer" : "layers"}` : "";
  }

  box.addEventListener("input", filter);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && box.value) { box.value = ""; filter(); event.preventDefault(); }
  });
  document.getElementById("unfold").addEventListener("click", () => folds.forEach((fold) => { fold.open = true; }));
  document.getElementById("fold").addEventListener("click", () => folds.forEach((fold) => { fold.open = false; }));
  // A link to the table unfolds it.
  const unfoldTarget = () => document.querySelector("#all:target > details")?.setAttribute("open", "");
  addEventListener("hashchange", unfoldTarget);
  unfoldTarget();
  search.hidden = false;
})();
