// Documents and answers. Whatever comes from a model or a task becomes text, never markup.
{
  const source = document.getElementById("samples-index");
  const PAGE = 50;
  const BUCKETS = 12;
  // Cells whose scores have room on a page that stands upright.
  const UPRIGHT = 14;
  if (source) view(JSON.parse(source.textContent));

  function view(index) {
    const root = document.getElementById("viewer");
    const list = document.getElementById("list");
    const article = document.getElementById("document");
    const form = root.querySelector("form");
    list.classList.toggle("wide", index.cells.length > UPRIGHT);
    const count = document.getElementById("count");
    const table = list.querySelector(".scroll").appendChild(document.createElement("table"));
    const head = table.createTHead().insertRow();
    const body = table.createTBody();
    const [before, after] = list.querySelectorAll(".pages button");
    const chunks = new Map();
    const waiting = new Map();
    document.querySelectorAll(".samples-chunk").forEach((item, number) => {
      chunks.set(number, Promise.resolve(item).then((element) => JSON.parse(element.textContent)));
    });
    const rows = index.documents.map(([task, id, tokens, [length, depth], scores, differs, place], number) => ({
      number, task, id, tokens, length: length ?? tokens, depth, scores, differs, place,
    }));
    let shown = rows;
    let first = 0;
    let opened = null;
    let searches = 0;

    // A chunk that is a file calls this with what it holds.
    globalThis.arkvChunk = (number, entries) => waiting.get(number)(entries);
    const chunk = (number) => {
      if (!chunks.has(number)) {
        chunks.set(number, new Promise((resolve, reject) => {
          waiting.set(number, resolve);
          const script = document.createElement("script");
          const file = `${index.beside}/${number}.js`;
          script.src = `${encodeURIComponent(index.beside)}/${number}.js`;
          script.onerror = () => { chunks.delete(number); reject(new Error(`${file} is not beside this page: it holds the answers`)); };
          document.head.append(script);
        }));
      }
      return chunks.get(number);
    };
    const entry = async (row) => (await chunk(row.place[0]))[row.place[1]];

    const make = (name, text = "", attributes = {}) => {
      const element = document.createElement(name);
      if (text !== "") element.textContent = text;
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      return element;
    };
    const number = (value, digits = 4) => value === null || value === undefined ? "" : String(Number(value.toPrecision(digits)));
    const colour = (cell) => cell.colour ? `var(--series-${cell.colour})` : "var(--text)";
    const fullOf = (cell) => index.cells.findIndex((other) => other.full && other.run === cell.run);
    // 1 and -1: better and worse than full. Unknown is 0.
    const against = (row, place) => {
      const full = fullOf(index.cells[place]);
      const sign = index.tasks[row.task].sign;
      if (full < 0 || full === place || !sign) return 0;
      const [mine, other] = [row.scores[place], row.scores[full]];
      return mine === null || other === null ? 0 : Math.sign(sign * (mine - other));
    };

    const options = (select, pairs) => {
      select.replaceChildren(...pairs.map(([value, text]) => make("option", text, { value })));
      select.closest("label").hidden = pairs.length < 2;
    };
    const grouped = (values) => {
      const known = [...new Set(values.filter((value) => value !== null))].sort((a, b) => a - b);
      if (known.length < 2) return [];
      if (known.length <= BUCKETS) return known.map((value) => [value, value]);
      const ends = [0, 1, 2, 3, 4].map((part) => known[Math.round(part * (known.length - 1) / 4)]);
      return [0, 1, 2, 3].map((part) => [part ? ends[part] + Number.EPSILON * ends[part] : ends[0], ends[part + 1]]);
    };
    const spans = { length: grouped(rows.map((row) => row.length)), depth: grouped(rows.map((row) => row.depth)) };
    const outcomes = [["", "all documents"]];
    index.cells.forEach((cell, place) => {
      if (cell.full || fullOf(cell) < 0) return;
      outcomes.push([`worse ${place}`, `full right, ${cell.label} wrong`], [`better ${place}`, `full wrong, ${cell.label} right`],
        [`other ${place}`, `${cell.label} says something else`]);
    });
    options(form.outcome, outcomes);
    options(form.task, [["", "all"], ...index.tasks.map((task, place) => [place, index.tasks.some((other) => other.model !== task.model) ? `${task.task}, ${task.model}` : task.task])].slice(index.tasks.length > 1 ? 0 : 1));
    for (const fact of ["length", "depth"]) {
      const texts = spans[fact].map(([low, high], place) => [place, low === high ? number(low) : `${number(low)} to ${number(high)}`]);
      options(form[fact], texts.length ? [["", "all"], ...texts] : []);
    }

    const fits = (row) => {
      const [kind, place] = form.outcome.value.split(" ");
      if (kind === "worse" && against(row, Number(place)) >= 0) return false;
      if (kind === "better" && against(row, Number(place)) <= 0) return false;
      if (kind === "other" && !(row.differs[place] >= 0 && row.differs[place] !== null)) return false;
      if (form.task.value !== "" && index.tasks.length > 1 && row.task !== Number(form.task.value)) return false;
      return ["length", "depth"].every((fact) => {
        if (form[fact].value === "") return true;
        const [low, high] = spans[fact][Number(form[fact].value)];
        return row[fact] !== null && row[fact] >= low && row[fact] <= high;
      });
    };
    const textOf = (row, item) => [
      row.id, JSON.stringify(item.reference), ...(item.parts || []).map((part) => part.text ?? part.tokens.join("")),
      ...item.answers.map((answer) => answer.text ?? ""),
    ].join("\n").toLowerCase();

    const select = async () => {
      const mine = ++searches;
      const wanted = form.text.value.trim().toLowerCase();
      let found = rows.filter(fits);
      if (wanted) {
        const kept = [];
        try {
          for (const [place, row] of found.entries()) {
            const item = await entry(row);
            if (mine !== searches) return;
            if (place % 200 === 0) count.textContent = `searching, ${place} of ${found.length} documents ...`;
            if (textOf(row, item).includes(wanted)) kept.push(row);
          }
        } catch (error) {
          count.textContent = error.message;
          return;
        }
        found = kept;
      }
      shown = found;
      first = 0;
      draw();
    };

    const draw = () => {
      count.textContent = `${shown.length} of ${rows.length} documents.`;
      body.replaceChildren(...shown.slice(first, first + PAGE).map(line));
      before.disabled = first === 0;
      after.disabled = first + PAGE >= shown.length;
      list.querySelector(".pages").hidden = shown.length <= PAGE;
      list.querySelector(".pages span").textContent = `${Math.min(first + 1, shown.length)} to ${Math.min(first + PAGE, shown.length)}`;
    };
    const line = (row) => {
      const element = make("tr");
      const name = make("td", "", { class: "left" });
      const button = make("button", row.id, { type: "button", "data-number": row.number });
      button.addEventListener("click", () => open(row));
      name.append(button);
      // In a column of its own it would leave a phone no room for a score.
      if (index.tasks.length > 1) name.append(make("small", index.tasks[row.task].task));
      element.append(name);
      element.append(make("td", row.tokens));
      if (spans.depth.length) element.append(make("td", number(row.depth, 3)));
      row.scores.forEach((score, place) => {
        const how = against(row, place);
        const mark = how < 0 ? " ▼" : how > 0 ? " ▲" : "";
        element.append(make("td", score === null ? "" : number(score, 3) + mark, how ? { class: how < 0 ? "worse" : "better" } : {}));
      });
      return element;
    };

    const swatched = (element, cell) => {
      const swatch = make("span", "", { class: "swatch" });
      swatch.style.color = colour(cell);
      element.prepend(swatch);
      return element;
    };
    const heads = [["document", true], ["tokens"], ...(spans.depth.length ? [["depth"]] : [])];
    head.append(...heads.map(([text, left]) => make("th", text, left ? { scope: "col", class: "left" } : { scope: "col" })),
      ...index.cells.map((cell) => swatched(make("th", cell.label, { scope: "col", title: cell.about }), cell)));

    const written = (answer, full) => {
      const pre = make("pre");
      let [pieces, place] = [answer.tokens, answer.differs];
      if (!pieces) {
        // Of a run that kept no tokens: from the first word that differs.
        const other = full?.text ?? answer.text;
        let at = 0;
        while (at < answer.text.length && answer.text[at] === other[at]) at += 1;
        while (at > 0 && /\S/.test(answer.text[at - 1])) at -= 1;
        const word = /^\s*\S*/.exec(answer.text.slice(at))[0].length;
        pieces = [answer.text.slice(0, at), answer.text.slice(at, at + word), answer.text.slice(at + word)];
        place = answer.text === other ? -1 : 1;
      }
      if (place === undefined || place < 0) pre.textContent = pieces.join("");
      else {
        const mark = make("mark", pieces[place] || "(ends)", { title: `the first token that is not full's, number ${(answer.differs ?? place) + 1}` });
        pre.append(pieces.slice(0, place).join(""), mark, pieces.slice(place + 1).join(""));
      }
      return pre;
    };
    const said = (answer) => {
      if (answer.differs === undefined) return "";
      return answer.differs < 0 ? "the same tokens as full" : `another token than full's from number ${answer.differs + 1} on`;
    };
    const divergences = (answer, parts) => {
      const tokens = (parts || []).find((part) => part.role === "continuation")?.tokens || [];
      const block = make("pre", "", { class: "kl" });
      answer.kl.forEach((kl, place) => {
        const text = tokens[place] ?? `${place + 1} `;
        const span = make("span", text, { title: `token ${place + 1}: KL ${number(kl)} nats${answer.agrees[place] ? "" : ", another token most likely"}` });
        span.style.background = `rgb(var(--kept) / ${Math.min(0.7, 0.35 * Math.sqrt(Math.max(kl, 0))).toFixed(3)})`;
        if (!answer.agrees[place]) span.style.textDecoration = "underline wavy";
        block.append(span);
      });
      const mean = answer.kl.reduce((sum, kl) => sum + kl, 0) / answer.kl.length;
      const most = answer.kl.indexOf(Math.max(...answer.kl));
      const agree = answer.agrees.filter(Boolean).length;
      return [block, make("p", `KL per token: mean ${number(mean, 3)}, largest ${number(answer.kl[most], 3)} nats at token ${most + 1}; the same most likely token in ${agree} of ${answer.kl.length}`, { class: "meta" })];
    };
    const choices = (answer, parts) => {
      const texts = (parts || []).filter((part) => part.role === "continuation" || part.role === "text");
      const table = make("table");
      const most = Math.max(...answer.choices.map(([value]) => value));
      answer.choices.forEach(([value, greedy], place) => {
        const element = make("tr");
        const text = texts.length === answer.choices.length ? texts[place].text : `${place + 1}`;
        const best = answer.choices.length > 1 && value === most;
        element.append(make("td", text.length > 80 ? `${text.slice(0, 80)} …` : text, { class: "left" }), make("td", number(value) + (best ? " ◀" : "")), make("td", greedy ? "greedy" : ""));
        if (best) element.style.fontWeight = "700";
        table.append(element);
      });
      const scroll = make("div", "", { class: "scroll" });
      scroll.append(table);
      return [scroll, make("p", "log-likelihoods in nats", { class: "meta" })];
    };
    const card = (answer, item) => {
      const cell = index.cells[answer.cell];
      const full = item.answers.find((other) => index.cells[other.cell].full && index.cells[other.cell].run === cell.run && other.repeat === answer.repeat);
      const block = make("div");
      block.style.setProperty("--of", colour(cell));
      block.append(swatched(make("h3", cell.label + (answer.repeat ? `, answer ${answer.repeat}` : "")), cell));
      const scores = Object.entries(answer.scores).map(([name, value]) => `${name} ${value === null ? "unknown" : number(value)}`);
      block.append(make("p", [scores.join(", "), cell.full ? "" : said(answer)].filter(Boolean).join("; "), { class: "meta" }));
      if (answer.text !== undefined) {
        block.append(written(answer, full));
        if (answer.tokens && answer.tokens.join("").trim() !== answer.text.trim()) block.append(make("p", `scored as the answer: ${JSON.stringify(answer.text)}`, { class: "meta" }));
      }
      if (answer.kl) block.append(...divergences(answer, item.parts));
      if (answer.choices) block.append(...choices(answer, item.parts));
      const seen = answer.states.reduce((sum, value) => sum + value, 0) || 1;
      const shares = answer.states.map((value) => 100 * value / seen);
      const bar = make("div", "", { class: "bar", "aria-hidden": "true" });
      ["o", "q", "e"].forEach((name, place) => {
        const part = make("span", "", { class: name });
        part.style.width = `${shares[place]}%`;
        bar.append(part);
      });
      block.append(bar, make("p", `Original ${number(shares[0], 3)} %, Quantized ${number(shares[1], 3)} %, Evicted ${number(shares[2], 3)} % of the tokens; ${answer.costs.join("; ")}`, { class: "meta" }));
      return block;
    };
    const NAMES = { context: "Context", question: "Question", continuation: "Continuation", text: "Text" };
    const END = 400;
    const prompt = (parts) => parts.flatMap((part) => {
      const text = part.text ?? part.tokens.join("");
      const details = make("details");
      details.open = part.role === "question";
      details.append(make("summary", `${NAMES[part.role]}, ${text.length} characters`), make("pre", text));
      // A question that is a part of its context stands at its end.
      const inside = part.role === "context" && parts.every((other) => other.role === "context");
      return inside && text.length > END ? [details, make("p", "It ends:", { class: "meta" }), make("pre", `… ${text.slice(-END)}`)] : [details];
    });

    const open = async (row) => {
      opened = row;
      const task = index.tasks[row.task];
      const place = shown.indexOf(row);
      const navigation = make("nav");
      for (const [name, to] of [["back", null], ["previous", shown[place - 1]], ["next", shown[place + 1]]]) {
        const button = make("button", name === "back" ? "Back to the list" : name === "next" ? "Next" : "Previous", { type: "button", name });
        button.disabled = to === undefined;
        button.addEventListener("click", () => to ? open(to) : close());
        navigation.append(button);
      }
      article.replaceChildren(navigation, make("h3", row.id), make("p", `${task.task}, ${task.model}, ${row.tokens} prompt tokens`, { class: "meta" }));
      list.hidden = true;
      article.hidden = false;
      let item;
      try {
        item = await entry(row);
      } catch (error) {
        article.append(make("p", error.message));
        return;
      }
      if (opened !== row) return;
      const facts = Object.entries(item.info).map(([name, value]) => `${name} ${typeof value === "string" ? value : JSON.stringify(value)}`).join("; ");
      if (facts) article.append(make("p", facts, { class: "meta" }));
      if (item.cut) article.append(make("p", "The prompt was longer than the context or --max-length and was cut."));
      if (item.parts) article.append(...prompt(item.parts));
      else article.append(make("p", "The prompt was not stored: the run was told not to, or is of an older suite.", { class: "missing" }));
      if (item.reference !== null) {
        article.append(make("h3", "Expected"), make("pre", typeof item.reference === "string" ? item.reference : JSON.stringify(item.reference, null, 1)));
      }
      const answers = make("div", "", { class: "answers" });
      answers.append(...item.answers.map((answer) => card(answer, item)));
      article.append(make("h3", "Answers"), answers);
      article.focus({ preventScroll: true });
      article.scrollIntoView({ block: "start" });
    };
    const close = () => {
      const row = opened;
      opened = null;
      article.hidden = true;
      list.hidden = false;
      const place = shown.indexOf(row);
      if (place >= 0 && (place < first || place >= first + PAGE)) {
        first = place - place % PAGE;
        draw();
      }
      body.querySelector(`button[data-number="${row.number}"]`)?.focus();
    };
    const turn = (step) => {
      first = Math.max(0, first + step * PAGE);
      draw();
    };
    before.addEventListener("click", () => turn(-1));
    after.addEventListener("click", () => turn(1));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", select);
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
      if (event.key === "Escape" && opened) close();
      else if (event.key === "Escape" && typing) event.target.blur();
      else if (typing) return;
      else if (event.key === "/" && !opened) {
        event.preventDefault();
        form.text.focus();
      } else if (event.key === "j" || event.key === "k") {
        const step = event.key === "j" ? 1 : -1;
        if (opened) {
          const next = shown[shown.indexOf(opened) + step];
          if (next) open(next);
          return;
        }
        const buttons = Array.from(body.querySelectorAll("button"));
        const at = buttons.indexOf(document.activeElement);
        buttons[at < 0 ? 0 : Math.min(Math.max(at + step, 0), buttons.length - 1)]?.focus();
      }
    });
    root.hidden = false;
    draw();
  }
}
