"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const rows = [...document.querySelectorAll("#table tbody tr")];
  const shown = new Set(rows.map((row) => Number(row.dataset.run)));
  const tokens = () => getComputedStyle(document.documentElement);
  let chosen = data.chosen;

  // A trace with only the points whose run is shown.
  const subset = (trace) => {
    const runs = trace.meta && trace.meta.runs;
    if (!runs) return { ...trace };
    const front = trace.meta.front;
    const keep = runs.map(
      (run, i) => shown.has(run) && !(front && front[i].some((above) => shown.has(above))),
    );
    const pick = (v) =>
      Array.isArray(v) && v.length === keep.length ? v.filter((_, i) => keep[i]) : v;
    const part = {};
    for (const [key, value] of Object.entries(trace)) {
      if (key === "meta") part[key] = value;
      else if (key === "error_y")
        part[key] = { ...value, array: pick(value.array), arrayminus: pick(value.arrayminus) };
      else part[key] = pick(value);
    }
    return part;
  };

  const paint = (trace, css) => {
    const get = (name) => css.getPropertyValue(name).trim();
    const meta = trace.meta || {};
    const color = meta.ink || meta.front ? get(meta.ink ? "--ink" : "--soft") : get(`--s${(meta.series || 0) % 6}`);
    const symbols = ["circle", "diamond", "square", "triangle-up", "cross", "x"];
    trace.marker = { color, size: 9, symbol: symbols[(meta.series || 0) % 6], ...trace.marker };
    if (meta.ink) trace.marker.line = { width: 2, color };
    if (meta.front) trace.line = { color, width: 1.5, dash: "dot" };
    if (trace.error_y)
      trace.error_y = { color: trace.type === "bar" ? get("--ink") : color, thickness: 1.3, width: 4, ...trace.error_y };
    return trace;
  };

  const draw = (id, figure) => {
    const element = $(id);
    if (!element) return;
    element.hidden = !figure;
    if (!figure) return;
    const css = tokens();
    const get = (name) => css.getPropertyValue(name).trim();
    const layout = JSON.parse(JSON.stringify(figure.layout));
    for (const key of Object.keys(layout).filter((k) => /^[xy]axis/.test(k)))
      layout[key] = {
        automargin: true, gridcolor: get("--line"), linecolor: get("--line"), zeroline: false,
        ticks: "", fixedrange: true, ...layout[key],
      };
    Object.assign(layout, {
      bargap: 0.35,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: { family: css.getPropertyValue("font-family") || "system-ui, sans-serif", size: 12.5, color: get("--ink") },
      margin: { l: 56, r: 12, t: 40, b: 48 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hovermode: "closest",
      hoverlabel: { bgcolor: get("--raised"), bordercolor: get("--line"), font: { color: get("--ink") }, align: "left" },
    });
    const traces = figure.data.map((trace) => paint(subset(trace), css));
    Plotly.react(element, traces, layout, { displayModeBar: false, responsive: true });
  };

  const layers = (run) => {
    const { figure, names, named, columns } = data.layers;
    if (!columns[run]) return null;
    const text = names[named[run]];
    const x = text.map((_, i) => i + 1);
    const filled = figure.data.map((trace, i) => ({ ...trace, x, y: columns[run][i], text }));
    return { layout: figure.layout, data: filled };
  };

  const compare = () => {
    const checked = document.querySelector('input[name="axis"]:checked');
    const axis = checked ? checked.value : "stored";
    draw("plot-sr", data.tradeoff.sr[axis]);
    draw("plot-kl", data.tradeoff.kl[axis]);
    for (const cell of document.querySelectorAll(".map td")) {
      const best = [...cell.children].find((entry) => shown.has(Number(entry.dataset.run)));
      for (const entry of cell.children) entry.hidden = entry !== best;
    }
  };
  const detail = () => {
    draw("plot-layers", layers(chosen));
    draw("plot-tasks", data.tasks[chosen]);
  };
  const redraw = () => { compare(); detail(); };

  const choose = (run) => {
    if (![...$("run").options].some((option) => option.value === String(run))) return;
    chosen = run;
    $("run").value = String(run);
    for (const panel of document.querySelectorAll(".panel")) panel.hidden = Number(panel.dataset.run) !== run;
    for (const row of rows) row.classList.toggle("chosen", Number(row.dataset.run) === run);
    detail();
  };

  const filter = () => {
    const words = $("f-text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const low = parseFloat($("f-low").value);
    const high = parseFloat($("f-high").value);
    shown.clear();
    for (const row of rows) {
      const tcr = parseFloat(row.dataset.tcr);
      const text = row.textContent.toLowerCase();
      const fits =
        words.every((word) => text.includes(word)) &&
        (!$("f-mode").value || row.dataset.mode === $("f-mode").value) &&
        (!$("f-structure").value || row.dataset.structure === $("f-structure").value) &&
        !(tcr < low - 1e-9) && !(tcr > high + 1e-9);
      row.hidden = !fits;
      if (fits) shown.add(Number(row.dataset.run));
    }
    $("count").value = `${shown.size} of ${rows.length} runs`;
    compare();
  };

  const sort = (heading) => {
    const index = heading.cellIndex;
    const numeric = heading.dataset.kind === "number";
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentNode.cells)
      other.setAttribute("aria-sort", other === heading ? (down ? "descending" : "ascending") : "none");
    const value = (row) => row.cells[index].dataset.v;
    const order = [...rows].sort((a, b) => {
      const [left, right] = [value(a), value(b)];
      if (left === "" || right === "") return (left === "") - (right === "");
      const way = numeric ? Number(left) - Number(right) : left.localeCompare(right, undefined, { numeric: true });
      return down ? -way : way;
    });
    document.querySelector("#table tbody").append(...order);
  };

  const system = matchMedia("(prefers-color-scheme: dark)");
  const label = () => {
    const set = document.documentElement.dataset.theme;
    const dark = set ? set === "dark" : system.matches;
    $("theme").textContent = dark ? "Light" : "Dark";
    $("theme").setAttribute("aria-label", dark ? "Switch to light colours" : "Switch to dark colours");
    return dark;
  };
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = label() ? "light" : "dark";
    label();
    redraw();
  });
  system.addEventListener("change", () => { label(); redraw(); });

  $("filters").addEventListener("input", filter);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(filter));
  for (const radio of document.querySelectorAll('input[name="axis"]')) radio.addEventListener("change", compare);
  $("run").addEventListener("change", () => choose(Number($("run").value)));
  for (const heading of document.querySelectorAll("#table thead th"))
    heading.querySelector("button").addEventListener("click", () => sort(heading));
  for (const button of document.querySelectorAll(".pick"))
    button.addEventListener("click", () => choose(Number(button.closest("[data-run]").dataset.run)));

  label();
  choose(chosen);
  compare();
})();
