// The figures of one answer: estimated while it streams, exact once the usage is known.

const show = (id, text) => (document.getElementById(id).textContent = text);

export class Figures {
  constructor() {
    this.sent = performance.now();
    this.first = null;
    this.last = null;
    this.tokens = 0;
    for (const id of ["ttft", "rate", "cached", "accepted"]) show(id, "\u2013");
    show("counts", "\u00a0");
  }

  // Counts a piece of the answer. It is one token, unless bytes of a character were held back.
  piece() {
    this.last = performance.now();
    this.first ??= this.last;
    this.tokens += 1;
    this.draw();
  }

  usage(usage) {
    this.tokens = usage.completion_tokens;
    this.draw();
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    show("cached", `${cached} of ${usage.prompt_tokens}`);
    const { accepted_prediction_tokens: yes = 0, rejected_prediction_tokens: no = 0 } =
      usage.completion_tokens_details ?? {};
    show("accepted", yes + no ? `${Math.round((100 * yes) / (yes + no))} %` : "none");
    show("counts", `${usage.prompt_tokens} tokens in, ${usage.completion_tokens} out`);
  }

  draw() {
    if (this.first === null) return;
    const waited = this.first - this.sent;
    show("ttft", waited < 1000 ? `${Math.round(waited)} ms` : `${(waited / 1000).toFixed(2)} s`);
    const seconds = (this.last - this.first) / 1000;
    if (this.tokens > 1 && seconds > 0) {
      const rate = (this.tokens - 1) / seconds;
      show("rate", rate < 10 ? rate.toFixed(1) : Math.round(rate));
    }
  }
}
