// A page that is served asks how its run goes; what is new is shown when it is asked for.
{
  const live = document.getElementById("live");
  const EVERY_MS = 2000;
  if (live) {
    const [bar, said, button] = live.children;
    const shown = Number(live.dataset.answers);
    button.addEventListener("click", () => location.reload());
    const look = async () => {
      try {
        const now = await (await fetch("/progress")).json();
        const of = now.asked === null ? "" : ` of ${now.asked}`;
        const age = now.age_s === null ? "" : `, the newest ${Math.round(now.age_s)} s ago`;
        const more = now.answers - shown;
        // A page without any answer has nothing that could be read on.
        if (more > 0 && shown === 0) location.reload();
        bar.hidden = now.finished || now.asked === null;
        bar.max = now.asked ?? 1;
        bar.value = now.answers;
        said.textContent = `${now.finished ? "The run has ended" : "The run has not ended"}: ${now.answers}${of} answers${now.finished ? "" : age}.${more > 0 ? ` ${more} are new.` : ""}`;
        button.hidden = more === 0;
        if (now.finished && more === 0) return;
      } catch {
        said.textContent = "arkv-bench view has ended: this page shows what was there.";
        bar.hidden = true;
        return;
      }
      setTimeout(look, EVERY_MS);
    };
    look();
  }
}
