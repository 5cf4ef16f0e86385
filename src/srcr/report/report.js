"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const rows = [...document.querySelectorAll("#table tbody tr")];
  const shown = new Set(data.names.map((_, i) => i));
  const SERIES = 8;
  const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross", "x", "triangle-down", "star-square"];
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const escape = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
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
      if (key === "meta") part[key] = { ...value, runs: pick(runs) };
      else if (key === "error_y")
        part[key] = { ...value, array: pick(value.array), arrayminus: pick(value.arrayminus) };
      else part[key] = pick(value);
    }
    return part;
  };

  const paint = (trace) => {
    const meta = trace.meta || {};
    const series = (meta.series || 0) % SERIES;
    const soft = meta.front || meta.soft;
    const ink = color(meta.ink || meta.base ? "--ink" : soft ? "--soft" : `--s${series}`);
    trace.marker = { color: ink, size: soft ? 6 : 9, symbol: SYMBOLS[series], ...trace.marker };
    if (meta.base) Object.assign(trace.marker, { symbol: "star", size: 13 });
    if (meta.base) trace.cliponaxis = false;
    if (meta.ink) trace.marker.line = { width: 2, color: ink };
    if (trace.type === "scatter") trace.line = { color: ink, width: 1.5, ...(soft ? { dash: "dot" } : {}), ...trace.line };
    if (trace.error_y)
      trace.error_y = { color: trace.type === "bar" ? color("--ink") : ink, thickness: 1.3, width: 4, ...trace.error_y };
    return trace;
  };

  // Ticks of a logarithmic axis: 1, 2 and 5 of each power of ten, or powers alone where those are many.
  const plain = (value) =>
    value >= 1e-4 && value < 1e6 ? String(Number(value.toPrecision(3))) : value.toExponential();
  const ticks = (low, high) => {
    let values = [];
    for (const [marks, step] of [[[1, 2, 5], 1], [[1], 1], [[1], 2], [[1], 5], [[1], 20]]) {
      values = [];
      for (let power = Math.floor(low); power <= high; power++)
        if (power % step === 0) for (const mark of marks) values.push(Number(`${mark}e${power}`));
      values = values.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
      if (values.length <= 8) break;
    }
    return values;
  };
  const logAxis = (axis, values) => {
    const logs = values.filter((value) => value > 0).map(Math.log10);
    if (!logs.length) return { ...axis, range: [-3, 0] };
    let [low, high] = [logs.reduce((a, b) => Math.min(a, b)), logs.reduce((a, b) => Math.max(a, b))];
    const pad = Math.max(0.06 * (high - low), (Math.log10(6) - (high - low)) / 2);
    [low, high] = [low - pad, high + pad];
    const tickvals = ticks(low, high);
    return { ...axis, range: [low, high], tickvals, ticktext: tickvals.map(plain) };
  };
  const extent = (trace, letter) => {
    const values = trace[letter] || [];
    const bars = letter === "y" && trace.error_y;
    if (!bars) return values;
    return [...values, ...values.map((v, i) => v + bars.array[i]), ...values.map((v, i) => v - bars.arrayminus[i])];
  };

  const draw = (id, figure) => {
    const element = $(id);
    if (!element) return;
    element.closest("figure").hidden = !figure;
    if (!figure) return;
    const layout = JSON.parse(JSON.stringify(figure.layout));
    const withBase = !$("with-base") || $("with-base").checked;
    const traces = figure.data
      .filter((trace) => withBase || !(trace.meta && trace.meta.base))
      .map((trace) => paint(subset(trace)));
    for (const key of Object.keys(layout).filter((k) => /^[xy]axis/.test(k))) {
      const letter = key[0];
      const own = traces.filter((trace) => (trace[`${letter}axis`] || letter) === letter + key.slice(5));
      layout[key] = {
        automargin: true, gridcolor: color("--line"), linecolor: color("--line"), zeroline: false,
        ticks: "", fixedrange: true, exponentformat: "power", minexponent: 5, ...layout[key],
      };
      if (layout[key].title) layout[key].title.standoff = 10; // else titles lie on wide tick labels
      if (layout[key].type !== "log") continue;
      layout[key] = logAxis(layout[key], own.flatMap((trace) => extent(trace, letter)));
      for (const trace of own) // the base's KL of 0
        if (trace.meta && trace.meta.base) {
          trace.meta = { ...trace.meta, values: trace.y };
          trace.y = trace.y.map((v) => (v > 0 ? v : 10 ** layout[key].range[0]));
        }
    }
    Object.assign(layout, {
      bargap: 0.3, ...layout,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: color("--ink") },
      margin: { l: 56, r: 16, t: 40, b: 48 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hovermode: "closest",
      hoverlabel: { bgcolor: color("--raised"), bordercolor: color("--line"), font: { color: color("--ink") }, align: "left" },
    });
    Plotly.react(element, traces, layout, { displayModeBar: false, responsive: true });
  };

  const layers = (run) => {
    const { layout, names, types, blocks, named, columns } = data.layers;
    if (!columns[run]) return null;
    const which = named[run];
    const traces = [...new Set(types[which])].flatMap((type, series) => {
      const own = types[which].map((_, i) => i).filter((i) => types[which][i] === type);
      const x = own.map((i) => (blocks[which][i] === null ? i : blocks[which][i]));
      const labels = own.map((i) => names[which][i]);
      const units = ["error %{y:.3g}", "%{y:g} bits", "%{y:.1f} % sparsity"];
      return units.map((unit, panel) => ({
        type: "scatter", mode: new Set(x).size === x.length ? "lines+markers" : "markers",
        name: escape(type), legendgroup: escape(type), showlegend: panel === 0, x,
        y: own.map((i) => columns[run][panel][i]), yaxis: panel ? `y${panel + 1}` : "y",
        text: labels.map(escape), hovertemplate: `%{text}<br>${unit}<extra></extra>`,
        marker: { size: 7 }, meta: { series, labels },
      }));
    });
    return { layout, data: traces };
  };

  // Octaves lie evenly on an axis of logarithms, whose ticks are powers of ten.
  const histogram = (run) => {
    const counted = data.histograms[run];
    if (!counted) return null;
    const { low, below, shares, marks } = counted;
    const x = shares.map((_, i) => low + i + 0.5);
    const nats = (power) => Number((2 ** power).toPrecision(2));
    const labels = shares.map((_, i) =>
      i === 0 && below ? `below ${nats(low + 1)}` : `${nats(low + i)} to ${nats(low + i + 1)}`);
    const spread = [low, low + shares.length].map((power) => power * Math.log10(2));
    const edges = [below ? spread[0] + 0.6 : spread[0], spread[1]]; // "less" stands at the left end
    const powers = ticks(...edges).filter((value) => Number.isInteger(Number(Math.log10(value).toFixed(9))));
    const tickvals = [...(below ? [low + 0.5] : []), ...powers.map(Math.log2)];
    const ticktext = [...(below ? ["less"] : []), ...powers.map(plain)];
    const lines = Object.entries(marks).map(([name, value]) => [name, Math.log2(value)]);
    return {
      data: [{
        type: "bar", name: "tokens", x, y: shares, width: 0.94, text: labels, textposition: "none", meta: { series: 0, labels },
        hovertemplate: "%{text} nats<br>%{y:.3g} % of the tokens<extra></extra>",
      }],
      layout: {
        xaxis: { title: { text: "KL(base ‖ compressed) of a token, nats" }, tickvals, ticktext },
        yaxis: { title: { text: "tokens, %" }, rangemode: "tozero" },
        showlegend: false,
        shapes: lines.map(([, at]) => ({ type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", line: { color: color("--ink"), width: 1, dash: "dot" } })),
        annotations: lines.map(([name, at], i) => ({ x: at, y: 1 - 0.08 * i, yref: "paper", text: name, showarrow: false, xanchor: "left", yanchor: "top", xshift: 3 })),
      },
    };
  };

  const compare = () => {
    const checked = document.querySelector('input[name="axis"]:checked');
    const axis = checked ? checked.value : "stored";
    for (const [key, figures] of Object.entries(data.tradeoff)) draw(`plot-${key}`, figures[axis]);
    for (const cell of document.querySelectorAll(".map td")) {
      const best = [...cell.children].find((entry) => shown.has(Number(entry.dataset.run)));
      for (const entry of cell.children) if (entry.dataset.run) entry.hidden = entry !== best;
    }
  };
  const detail = () => {
    draw("plot-layers", layers(chosen));
    draw("plot-tasks", data.tasks[chosen]);
    draw("plot-histogram", histogram(chosen));
  };
  const searches = () =>
    data.searches.forEach((figures, i) => {
      for (const [key, figure] of Object.entries(figures)) draw(`plot-search-${i + 1}-${key}`, figure);
    });
  const redraw = () => { compare(); detail(); searches(); };

  const choose = (run) => {
    if (![...$("run").options].some((option) => option.value === String(run))) return;
    chosen = run;
    $("run").value = String(run);
    $("summary").textContent = data.summaries[run];
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

  const save = (name, href) => Object.assign(document.createElement("a"), { download: name, href }).click();
  // Spreadsheets take a text that begins with one of these signs for a formula, and names are not ours.
  const cell = (value) => {
    let text = value === null || value === undefined ? "" : String(value);
    if (/^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text))) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const saveCsv = (name, lines) => {
    const text = lines.map((line) => line.map(cell).join(",")).join("\r\n");
    const url = URL.createObjectURL(new Blob([`\ufeff${text}\r\n`], { type: "text/csv" }));
    save(name, url);
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  };
  const plotLines = ({ data: traces, layout }) => {
    const lines = [["series", "label", "x axis", "x", "y axis", "y", "low", "high"]];
    const title = (trace, letter) => {
      const axis = layout[`${letter}axis${(trace[`${letter}axis`] || letter).slice(1)}`];
      return axis && axis.title ? axis.title.text : "";
    };
    for (const trace of traces) {
      const meta = trace.meta || {};
      if (meta.front || meta.soft) continue;
      const bars = trace.error_y;
      trace.x.forEach((x, i) => {
        const label = meta.labels ? meta.labels[i] : meta.runs ? data.names[meta.runs[i]] : "";
        const y = (meta.values || trace.y)[i];
        const ends = bars ? [y - bars.arrayminus[i], y + bars.array[i]] : ["", ""];
        lines.push([trace.name, label, title(trace, "x"), x, title(trace, "y"), y, ...ends]);
      });
    }
    return lines;
  };
  const tableLines = () => {
    const below = (entry) => (entry.querySelector("small, .interval") || { textContent: "" }).textContent;
    if (!rows.length) {
      const entries = [...document.querySelectorAll("#values > div")];
      const name = (entry) => entry.querySelector("dt").firstChild.textContent;
      return [["column", "value", "detail"], ...entries.map((e) => [name(e), e.dataset.v, below(e.querySelector("dd"))])];
    }
    const heads = [...document.querySelectorAll("#table thead th")].map((head) => head.textContent.trim());
    const visible = [...document.querySelectorAll("#table tbody tr")].filter((row) => !row.hidden);
    return [
      heads.flatMap((head, i) => (i ? [head, `${head}, detail`] : [head])),
      ...visible.map((row) => [...row.cells].flatMap((own, i) => (i ? [own.dataset.v, below(own)] : [own.dataset.v]))),
    ];
  };
  const savePng = async (id) => {
    const element = $(id);
    const [width, height] = [element.offsetWidth, element.offsetHeight];
    const layout = { ...element.layout, width, height, autosize: false, paper_bgcolor: color("--ground") };
    save(`srcr-${id}.png`, await Plotly.toImage({ data: element.data, layout }, { format: "png", scale: 2, width, height }));
  };
  for (const button of document.querySelectorAll("[data-save]"))
    button.addEventListener("click", () => {
      const { plot, save: kind } = button.dataset;
      if (kind === "png") savePng(plot);
      else if (kind === "csv") saveCsv(`srcr-${plot}.csv`, plotLines($(plot)));
      else saveCsv("srcr-runs.csv", tableLines());
    });

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

  if ($("filters")) {
    $("filters").addEventListener("input", filter);
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    $("filters").addEventListener("reset", () => setTimeout(filter));
  }
  for (const choice of document.querySelectorAll(".choice input")) choice.addEventListener("change", compare);
  $("run").addEventListener("change", () => choose(Number($("run").value)));
  for (const heading of document.querySelectorAll("#table thead th"))
    heading.querySelector("button").addEventListener("click", () => sort(heading));
  for (const button of document.querySelectorAll(".pick"))
    button.addEventListener("click", () => choose(Number(button.closest("[data-run]").dataset.run)));

  label();
  choose(chosen);
  compare();
  searches();
})();
