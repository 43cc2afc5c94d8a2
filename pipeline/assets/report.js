"use strict";
// Lays a reconstruction over its original with a slider. Everything is in the page already; this only moves it about.
(() => {
  const viewer = document.getElementById("viewer");
  const rows = [...document.querySelectorAll(".pictures")];
  if (!viewer || !rows.length) return;
  const find = (name) => viewer.querySelector(name);
  const under = find(".under"), over = find(".over"), slider = find("input"), stage = find(".stage"), buttons = find(".rows");
  const names = [...rows[0].querySelectorAll("figure")].map((figure) => figure.dataset.row).filter((name) => name !== "original");
  let current = 0, compared = names.includes("rectified") ? "rectified" : names[0];

  const figure = (name) => rows[current].querySelector(`figure[data-row="${name}"]`);
  const show = () => {
    under.src = figure(compared).querySelector("img").src;
    over.src = figure("original").querySelector("img").src;
    stage.classList.toggle("small", rows[current].classList.contains("small"));
    const value = figure(compared).querySelector("figcaption span").textContent;
    find(".right").textContent = compared + (value ? ` ${value}` : "");
    find(".what").textContent = rows[current].title;
    for (const button of buttons.children) button.setAttribute("aria-pressed", String(button.textContent === compared));
    rows.forEach((row, i) => row.classList.toggle("current", i === current));
  };
  const cut = () => stage.style.setProperty("--cut", `${slider.value}%`);

  for (const name of names) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => { compared = name; show(); });
    buttons.append(button);
  }
  for (const button of viewer.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => { current = (current + Number(button.dataset.step) + rows.length) % rows.length; show(); });
  }
  slider.addEventListener("input", cut);
  rows.forEach((row, i) => {
    for (const item of row.querySelectorAll("figure")) {
      const image = item.querySelector("img");
      const choose = () => {
        current = i;
        if (item.dataset.row !== "original") compared = item.dataset.row;
        show();
        viewer.scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
        slider.focus({ preventScroll: true });
      };
      image.tabIndex = 0;
      image.setAttribute("role", "button");
      image.addEventListener("click", choose);
      image.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); }
      });
    }
  });
  viewer.hidden = false;
  document.documentElement.classList.add("live");
  cut();
  show();
})();
