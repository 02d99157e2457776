// Light or dark: as the system has it, unless somebody has chosen. Before anything is shown.

(() => {
  const key = "florence-theme";
  const root = document.documentElement;
  const kept = localStorage.getItem(key);
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme")?.addEventListener("click", () => {
      const dark = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
      const next = (root.dataset.theme ?? dark) === "dark" ? "light" : "dark";
      root.dataset.theme = next;
      localStorage.setItem(key, next);
    });
  });
})();
