"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    plotlyServerURL: "",
    typesetMath: false,
  };

  function colors() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    return {
      "font.color": of("--ink"),
      "hoverlabel.bgcolor": of("--raised"),
      "hoverlabel.bordercolor": of("--soft"),
      "hoverlabel.font.color": of("--ink"),
      "modebar.color": of("--soft"),
      "modebar.activecolor": of("--ink"),
    };
  }

  function colored(layout) {
    const found = colors();
    // narrow: the titles need the legends' place
    if (innerWidth < 760 && layout.legend && layout.legend.xanchor === "right") layout.showlegend = false;
    layout.font.color = found["font.color"];
    layout.hoverlabel.bgcolor = found["hoverlabel.bgcolor"];
    layout.hoverlabel.bordercolor = found["hoverlabel.bordercolor"];
    layout.hoverlabel.font = { ...layout.hoverlabel.font, color: found["hoverlabel.font.color"] };
    layout.modebar.color = found["modebar.color"];
    layout.modebar.activecolor = found["modebar.activecolor"];
    return layout;
  }

  async function draw() {
    for (const [name, figure] of Object.entries(figures)) {
      await Plotly.newPlot(name, figure.data, colored(figure.layout), config);
    }
    document.documentElement.dataset.drawn = Math.round(performance.now());
  }

  draw();
  dark.addEventListener("change", () => {
    for (const name of Object.keys(figures)) Plotly.relayout(name, colors());
  });
})();
