// Runs before the first paint, so that a chosen theme never flashes. Not a module: modules wait for the document.
(function () {
  let theme = null;
  try {
    theme = localStorage.getItem("dalle.theme");
  } catch {
    // Storage is refused in some private windows: the system's theme stands.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
