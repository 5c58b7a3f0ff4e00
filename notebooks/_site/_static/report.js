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

// With ?class in the address, a class votes before it looks: contents and answers are left out, a
// figure has its title when it is clicked (before the first section it is an answer, and all of it
// waits), and links lead to pages that are shown likewise.
if (new URLSearchParams(location.search).has("class")) {
  document.body.classList.add("in-class")
  for (const bold of document.querySelectorAll("article p > strong:first-child")) {
    if (!["Answer.", "The answer."].includes(bold.textContent)) continue
    for (let part = bold.parentElement; part?.matches("p, ul, ol"); part = part.nextElementSibling)
      part.classList.add("answer")
  }
  for (const link of document.querySelectorAll("article a[href*='.html']:not([href*=':'])")) {
    link.search += link.search ? "&class" : "?class"
  }
  addEventListener("load", () => {
    for (const image of document.querySelectorAll("figure.align-default img")) {
      const title = `inset(${2900 / image.naturalHeight}% 0 0) content-box` // one line
      if (image.closest("section section")) image.style.clipPath = title
      else image.style.opacity = 0
      image.addEventListener("click", () => (image.style.clipPath = image.style.opacity = ""))
    }
  })
}

// What scrolls can be reached by Tab, and so scrolled with the arrow keys.
addEventListener("load", async () => {
  await window.MathJax?.startup.promise
  const observer = new ResizeObserver((entries) => {
    for (const {target: box} of entries) {
      const scrolls = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight
      box.tabIndex = scrolls ? 0 : -1
    }
  })
  const boxes = "pre, div.output.text_html, .table, .table-wrapper, figure.align-default, div.math"
  for (const box of document.querySelectorAll(boxes)) observer.observe(box)
})
