// Before the first paint: the chosen colours. A classic script, because modules run after it.
"use strict";
(() => {
  const stored = localStorage.getItem("omni.theme");
  const theme = stored === "light" || stored === "dark" ? stored : "auto";
  document.documentElement.dataset.theme = theme;
  addEventListener("DOMContentLoaded", () => {
    for (const radio of document.querySelectorAll("#theme input")) {
      radio.checked = radio.value === theme;
      radio.addEventListener("change", () => {
        document.documentElement.dataset.theme = radio.value;
        localStorage.setItem("omni.theme", radio.value);
      });
    }
  });
})();
