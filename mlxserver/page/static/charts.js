// Charts as SVG.

import { h, rate, svg } from "./dom.js";

// A line over the last minutes. Its label has the last value as text.
export function sparkline(label) {
  const line = svg("polyline", { class: "spark-line", fill: "none", points: "" });
  const shape = svg("svg", { class: "spark", viewBox: "0 0 120 28", preserveAspectRatio: "none", "aria-hidden": "true" }, line);
  const value = h("span", { class: "spark-value", text: "–" });
  const element = h("div", { class: "metric" }, h("span", { class: "metric-label", text: label }), value, shape);
  return {
    element,
    update(values, format) {
      const known = values.map((each, n) => [n, each]).filter(([, each]) => each !== null && each !== undefined);
      const most = Math.max(...known.map(([, each]) => each), 1e-9);
      const step = 120 / Math.max(1, 179);
      const offset = 180 - values.length;
      const points = known.map(([n, each]) => `${((offset + n) * step).toFixed(1)},${(26 - 24 * (each / most)).toFixed(1)}`);
      if (points.length === 1) points.push(points[0].replace(/^[\d.]+/, (x) => String(Number(x) - 2))); // a dot is nothing
      line.setAttribute("points", points.join(" "));
      const last = known.at(-1);
      const text = last ? format(last[1]) : "–";
      if (value.textContent !== text) value.textContent = text;
    },
  };
}

// Parts of a whole, side by side. parts: { name, value, color } in the order of the bar.
export function bar(parts, total, format, label) {
  const shares = parts.filter((part) => part.value > 0);
  const shape = svg("svg", { class: "bar", viewBox: "0 0 1000 24", preserveAspectRatio: "none", role: "img", "aria-label": label });
  let x = 0;
  for (const part of shares) {
    const width = (1000 * part.value) / Math.max(total, 1);
    shape.append(svg("rect", { x: x.toFixed(2), y: 0, width: Math.max(0.5, width - 1.5).toFixed(2), height: 24, class: `fill-${part.color}` },
      svg("title", { text: `${part.name}: ${format(part.value)}` })));
    x += width;
  }
  const legend = h("ul", { class: "legend" }, parts.map((part) => h("li", {},
    h("span", { class: `dot bg-${part.color}` }), h("span", { text: part.name }), h("strong", { text: format(part.value) }))));
  return [shape, legend];
}

// Lines over a scale of loads. series: { name, color, points: [[x label, value], ...] }.
export function plot(title, series, unit) {
  const labels = [...new Set(series.flatMap((each) => each.points.map(([x]) => x)))];
  const values = series.flatMap((each) => each.points.map(([, y]) => y)).filter((y) => y !== null);
  const most = niceTop(Math.max(...values, 1e-9));
  const [left, right, top, bottom, width, height] = [52, 16, 12, 28, 420, 220];
  const x = (label) => left + (labels.length < 2 ? 0.5 : labels.indexOf(label) / (labels.length - 1)) * (width - left - right);
  const y = (value) => height - bottom - (value / most) * (height - top - bottom);
  const shape = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const tick of [0, 0.25, 0.5, 0.75, 1].map((share) => share * most)) {
    shape.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "tick", x: left - 6, y: y(tick) + 4, "text-anchor": "end", text: rate(tick).replace(/\.0$/, "") }));
  }
  for (const label of labels) shape.append(svg("text", { class: "tick", x: x(label), y: height - 8, "text-anchor": "middle", text: label }));
  for (const each of series) {
    const known = each.points.filter(([, value]) => value !== null);
    shape.append(svg("polyline", { class: `line stroke-${each.color}`, points: known.map(([l, v]) => `${x(l)},${y(v)}`).join(" ") }),
      ...known.map(([l, v]) => svg("circle", { class: `fill-${each.color}`, cx: x(l), cy: y(v), r: 4 },
        svg("title", { text: `${each.name}, ${l}: ${rate(v)} ${unit}` }))));
  }
  const legend = h("ul", { class: "legend" }, series.map((each) => h("li", {},
    h("span", { class: `dot bg-${each.color}` }), h("span", { text: each.name }))));
  return h("figure", { class: "panel" }, h("figcaption", { text: `${title} (${unit})` }), shape, series.length > 1 ? legend : null);
}

const niceTop = (most) => {
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 2.5, 4, 5, 8, 10].map((each) => each * power).find((each) => each >= most);
};
