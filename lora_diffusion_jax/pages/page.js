"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector) => Array.from(document.querySelectorAll(selector));

  // What the reader has chosen lives in the address, so that it survives a reload.
  const chosen = { off: [], sort: null, metrics: [], follow: data.running };
  try {
    Object.assign(chosen, JSON.parse(decodeURIComponent(location.hash.slice(1))));
  } catch {
    // no choice yet
  }
  const keep = () => history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify(chosen)));

  // Neighbours in the list get hues far apart; after twelve runs the lines are dashed.
  const colour = (run) => `hsl(${(215 + run * 137.5) % 360} 62% 52%)`;
  const dash = (run) => (run < 12 ? "" : `${3 + 3 * (Math.floor(run / 12) % 4)} 3`);
  const paint = (swatch, run) => { swatch.style.background = colour(run); };
  all("#runs tbody tr").forEach((row) => paint(row.querySelector(".swatch"), row.dataset.run));

  // The table.
  const heads = all("#runs th");
  function sort() {
    if (!chosen.sort) return;
    const [title, direction] = chosen.sort;
    const column = heads.findIndex((head) => head.textContent.trim() === title);
    if (column < 0) return;
    heads.forEach((head, k) => {
      if (k === column) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    const key = (row) => {
      const cell = row.cells[column];
      const number = cell.dataset.number;
      return number === undefined ? cell.textContent.trim() : Number(number);
    };
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // empty cells stay last
      if (typeof x === typeof y) {
        return direction * (typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true }));
      }
      return typeof x === "number" ? -1 : 1;
    };
    const body = document.querySelector("#runs tbody");
    Array.from(body.rows).sort(compare).forEach((row) => body.append(row));
  }
  heads.forEach((head) => head.querySelector("button").addEventListener("click", () => {
    const title = head.textContent.trim();
    const again = chosen.sort && chosen.sort[0] === title;
    chosen.sort = [title, again ? -chosen.sort[1] : 1];
    keep();
    sort();
  }));
  sort();

  // The curves.
  const drawing = "http://www.w3.org/2000/svg";
  function add(parent, tag, attributes, text) {
    const element = document.createElementNS(drawing, tag);
    Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
    const found = [];
    for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k += 1) found.push(k * step);
    return found;
  }

  function short(number) {
    const size = Math.abs(number);
    if (size >= 1e6) return `${+(number / 1e6).toPrecision(3)}M`;
    if (size >= 1e4) return `${+(number / 1e3).toPrecision(3)}k`;
    return String(+number.toPrecision(3));
  }

  function draw(chart) {
    const svg = chart.querySelector("svg");
    const metric = chart.querySelector("select").value;
    svg.replaceChildren();
    svg.setAttribute("aria-label", metric);
    const shown = data.runs
      .map((run, k) => ({ k, name: run.name, points: run.curves[metric] || [] }))
      .filter((run) => run.points.length && !chosen.off.includes(run.name));
    if (!shown.length) {
      add(svg, "text", { x: 280, y: 150, "text-anchor": "middle" }, "no run to show");
      return;
    }
    const values = shown.flatMap((run) => run.points.map((point) => point[1]));
    const images = shown.flatMap((run) => run.points.map((point) => point[0]));
    const pad = (low, high) => (low < high ? [low, high] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2]);
    const least = (list) => list.reduce((a, b) => Math.min(a, b));
    const most = (list) => list.reduce((a, b) => Math.max(a, b));
    const [bottom, top] = pad(least(values), most(values));
    const [left, right] = pad(Math.min(0, least(images)), most(images));
    const x = (value) => 62 + (value - left) / (right - left) * 484;
    const y = (value) => 268 - (value - bottom) / (top - bottom) * 252;
    ticks(bottom, top, 5).forEach((value) => {
      add(svg, "line", { class: "axis", x1: 62, x2: 546, y1: y(value), y2: y(value) });
      add(svg, "text", { x: 56, y: y(value) + 4, "text-anchor": "end" }, short(value));
    });
    ticks(left, right, 5).forEach((value) => {
      add(svg, "text", { x: x(value), y: 290, "text-anchor": "middle" }, short(value));
    });
    shown.forEach((run) => {
      const path = run.points.map((point, n) => `${n ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`).join("");
      const curve = add(svg, "path", { class: "curve", d: path, stroke: colour(run.k), "stroke-dasharray": dash(run.k) });
      add(curve, "title", {}, run.name);
      const [lastX, lastY] = run.points[run.points.length - 1];
      const dot = add(svg, "circle", { cx: x(lastX), cy: y(lastY), r: 3, fill: colour(run.k) });
      add(dot, "title", {}, `${run.name}: ${lastY}`);
    });
  }

  const charts = all(".chart");
  const drawAll = () => charts.forEach(draw);
  if (data.metrics.length) {
    document.getElementById("curves").hidden = false;
    charts.forEach((chart, k) => {
      const select = chart.querySelector("select");
      data.metrics.forEach((name) => select.append(new Option(name, name)));
      const wanted = chosen.metrics[k] || data.metrics[Math.min(k, data.metrics.length - 1)];
      select.value = data.metrics.includes(wanted) ? wanted : data.metrics[0];
      select.addEventListener("change", () => {
        chosen.metrics = charts.map((other) => other.querySelector("select").value);
        keep();
        draw(chart);
      });
    });
    const boxes = data.runs.map((run, k) => {
      const label = document.createElement("label");
      const box = document.createElement("input");
      const swatch = document.createElement("span");
      box.type = "checkbox";
      box.checked = !chosen.off.includes(run.name);
      swatch.className = "swatch";
      paint(swatch, k);
      label.append(box, swatch, run.name);
      document.getElementById("switches").append(label);
      box.addEventListener("change", switched);
      return box;
    });
    function switched() {
      chosen.off = data.runs.filter((run, k) => !boxes[k].checked).map((run) => run.name);
      keep();
      drawAll();
    }
    [["all", true], ["none", false]].forEach(([id, on]) => {
      document.getElementById(id).addEventListener("click", () => {
        boxes.forEach((box) => { box.checked = on; });
        switched();
      });
    });
    drawAll();
  }

  // A page of runs that are not over is written again and again.
  if (data.running) {
    const follow = document.getElementById("follow");
    document.getElementById("follow-label").hidden = false;
    follow.checked = chosen.follow;
    follow.addEventListener("change", () => { chosen.follow = follow.checked; keep(); });
    setInterval(() => { if (follow.checked) location.reload(); }, 15000);
  }
})();
