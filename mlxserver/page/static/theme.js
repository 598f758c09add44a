// Colours, before anything is painted: those of the system, unless others were chosen.
(() => {
  try {
    const chosen = localStorage.getItem("mlx.theme");
    if (chosen) document.documentElement.dataset.theme = chosen;
  } catch { /* no storage: the system's colours */ }
})();
