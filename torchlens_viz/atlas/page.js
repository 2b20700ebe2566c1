"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const search = at("page:search"), found = at("page:found"), filter = at("page:filter");
  const rests = [...document.querySelectorAll(".rest")].map((rest) => {
    const rows = [...rest.querySelectorAll("tbody tr")];
    return {
      rows, name: rest.closest("section").getAttribute("aria-label"),
      strips: [...rest.querySelectorAll(".strips p")],
      ids: new Map(rows.map((row) => [row.cells[0].textContent, row.id])),
    };
  });
  const numbers = (strip) => strip.textContent.split("\t");
  const marked = [...document.querySelectorAll(".tiles a, article.channel, .rest tbody tr")];
  const names = [...document.querySelectorAll("[data-layer]")].map((each) => ({
    name: each.dataset.layer, href: each.getAttribute("href"),
  })).concat([...document.querySelectorAll("article.channel")].map((each) => ({
    name: each.dataset.name, href: each.querySelector("h4 a").getAttribute("href"),
  }))).concat(rests.flatMap(({ name, rows }) => rows.map((row) => ({
    name: `${name}:${row.cells[0].textContent}`, href: `#${encodeURIComponent(row.id)}`,
  }))));
  const MOST = 12;

  const open = (target) => {
    for (let each = target; each; each = each.parentElement) {
      if (each.tagName === "DETAILS") each.open = true;
    }
  };
  const go = () => {
    let id = location.hash.slice(1), target = at(id);
    if (!target) {
      try { id = decodeURIComponent(id); } catch { return; }
      target = at(id);
    }
    if (!target) return;
    open(target);
    target.scrollIntoView();
    if (target.tabIndex === -1) target.focus({ preventScroll: true });
  };

  const look = () => {
    const words = search.value.trim().toLowerCase();
    const hits = words ? names.filter((each) => each.name.toLowerCase().includes(words)) : [];
    // What is called so comes before what begins so, and that before what has it somewhere.
    const rank = (each) => {
      const name = each.name.toLowerCase();
      return name === words ? 0 : name.startsWith(words) ? 1 : 2;
    };
    hits.sort((one, other) => rank(one) - rank(other));
    found.replaceChildren(...hits.slice(0, MOST).map((each) => {
      const item = document.createElement("li"), link = document.createElement("a");
      link.href = each.href;
      link.textContent = each.name;
      item.append(link);
      return item;
    }));
    if (words && hits.length !== Math.min(hits.length, MOST)) {
      const more = document.createElement("li");
      more.textContent = `and ${hits.length - MOST} more`;
      found.append(more);
    } else if (words && !hits.length) {
      const none = document.createElement("li");
      none.textContent = "nothing is called so";
      found.append(none);
    }
  };

  const sift = () => {
    let count = 0;
    for (const each of marked) {
      const fits = !filter.value || (each.dataset.k || "").split(" ").includes(filter.value);
      each.hidden = !fits;
      if (fits && each.tagName !== "A") count += 1;
    }
    for (const { strips, rows } of rests) {
      const fitting = new Set(rows.filter((row) => !row.hidden).map((row) => row.cells[0].textContent));
      for (const strip of rows.length ? strips : []) {
        strip.hidden = !numbers(strip).some((number) => fitting.has(number));
      }
    }
    at("page:count").textContent = filter.value ? `${count} channel${count === 1 ? "" : "s"}` : "";
  };

  const order = at("page:order");
  // Each group is filled anew from its parts: so many of the first, the rest into the second.
  const groups = [".sheet .tiles", ".channels", ".rest tbody"].flatMap((where) => {
    const parents = new Set([...document.querySelectorAll(where)].map((each) => each.closest(".sheet") || each));
    return [...parents].map((parent) => {
      const boxes = parent.matches(".sheet") ? [...parent.querySelectorAll(".tiles")] : [parent];
      const own = boxes.map((box) => [...box.children].filter((each) => each.matches("a, article, tr")));
      return { boxes, sizes: own.map((each) => each.length), members: own.flat() };
    });
  });
  const arrange = () => {
    for (const { boxes, sizes, members } of groups) {
      const rank = (each) => Number(each.dataset[order.value] ?? members.length);
      const sorted = order.value ? [...members].sort((one, other) => rank(one) - rank(other)) : [...members];
      boxes.forEach((box, place) => box.append(...sorted.splice(0, sizes[place])));
    }
  };

  at("page:tools").hidden = false;
  if (order) {
    order.addEventListener("change", arrange);
    if (order.value) arrange();
  }
  search.addEventListener("input", look);
  search.addEventListener("keydown", (event) => {
    const first = found.querySelector("a");
    if (event.key === "Enter" && first) { event.preventDefault(); location.hash = first.getAttribute("href"); }
    if (event.key === "Escape") { search.value = ""; look(); }
  });
  filter.addEventListener("change", sift);
  for (const { strips, ids } of rests) {
    for (const strip of ids.size ? strips : []) {
      strip.style.cursor = "pointer";
      strip.addEventListener("click", (event) => {
        const place = (event.clientX - strip.getBoundingClientRect().left) / strip.firstChild.offsetWidth;
        const id = ids.get(numbers(strip)[Math.floor(8 * place)]);
        if (id) location.hash = encodeURIComponent(id);
      });
    }
  }
  addEventListener("hashchange", go);
  if (location.hash) go();
  if (filter.value) sift();
})();
