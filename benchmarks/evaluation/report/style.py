"""Style of the worst cases, after the style sheet of ``fusion-bench``'s report."""

CSS = """
.worst { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px; }
.worst .card { padding: 12px; }
.worst img { display: block; width: 100%; height: 200px; object-fit: contain; border-radius: 8px; margin: 0 0 10px;
  background: var(--page); }
.worst dl { grid-template-columns: max-content minmax(0, 1fr); gap: 2px 12px; font-size: 14px; }
.worst dd { white-space: pre-wrap; max-height: 9em; overflow: auto; }
.worst .wrong { color: var(--roofline); font-weight: 650; }
.worst .note { margin: 8px 0 0; }
.shares td { text-align: right; white-space: nowrap; }
.shares + dl { margin-top: 12px; }
.shares thead th:not(:first-child) { text-align: right; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin: 14px 0; align-items: start; }
.two > * { min-width: 0; }
@media (max-width: 860px) { .two { grid-template-columns: 1fr; } }
@media (max-width: 600px) { .shares td { text-align: left; } }
"""
