// Code that is not the lesson is left out; one switch, which every page remembers, shows it.
const folds = document.querySelectorAll(
  "article details.hide:has(> .cell_input):not(.tag_hide-cell > *)")
if (folds.length) {
  const button = document.createElement("button")
  const show = (on) => {
    for (const fold of folds) fold.open = on
    document.body.classList.toggle("with-code", on)
    button.textContent = on ? "Hide the code" : "Show the code"
  }
  button.className = "show-code"
  button.addEventListener("click", () => {
    const on = !document.body.classList.contains("with-code")
    show(on)
    try { localStorage.setItem("show-code", on) } catch {}  // a reader may forbid pages to store
  })
  document.querySelector("article h1").after(button)
  let stored
  try { stored = localStorage.getItem("show-code") } catch {}
  show(stored == "true")
}

// What a page needs to be used by keyboard and heard by screen reader.
addEventListener("load", async () => {
  await window.MathJax?.startup.promise
  // A reference is a link inside a picture, which MathJax hides in favour of a text without the
  // link: the other way round.
  for (const svg of document.querySelectorAll("mjx-container svg:has(a)")) {
    const text = svg.nextElementSibling
    text.setAttribute("aria-hidden", "true")
    svg.removeAttribute("aria-hidden")
    svg.removeAttribute("role")
    svg.querySelector("a").setAttribute("aria-label", `equation ${text.textContent}`)
  }
  // What scrolls can be reached by Tab, and so scrolled with the arrow keys.
  const observer = new ResizeObserver((entries) => {
    for (const {target: box} of entries) {
      const scrolls = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight
      box.tabIndex = scrolls ? 0 : -1
    }
  })
  const boxes = "pre, div.output.text_html, .table, .table-wrapper, figure.align-default, div.math"
  for (const box of document.querySelectorAll(boxes)) observer.observe(box)
})
