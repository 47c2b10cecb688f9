// The list of messages: only text, never HTML. ``` fences become code blocks.

const list = () => document.getElementById("messages");
const NEAR_END_PX = 80;

export class Message {
  constructor(role, text = "") {
    document.getElementById("welcome").hidden = true;
    this.text = text;
    this.box = document.createElement("div");
    this.box.className = `message ${role}`;
    this.body = document.createElement("div");
    this.body.className = "text";
    this.box.append(this.body);
    list().append(this.box);
    this.draw();
    list().scrollTop = list().scrollHeight;
  }

  add(text) {
    this.text += text;
    // Draws once a frame, however fast the tokens come.
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  set isRunning(value) {
    this.box.classList.toggle("running", value);
    if (!value) this.draw();
  }

  note(text, isBad = false) {
    const note = document.createElement("div");
    note.className = isBad ? "note bad" : "note";
    note.textContent = text;
    this.box.append(note);
  }

  remove() {
    cancelAnimationFrame(this.frame);
    this.box.remove();
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    const isAtEnd = list().scrollHeight - list().scrollTop - list().clientHeight < NEAR_END_PX;
    // Every second part is inside a fence. Its first line is the language.
    const parts = this.text.split(/^```/m).map((part, index) => {
      if (index % 2 === 0) return document.createTextNode(part.replace(/^\n/, ""));
      const block = document.createElement("pre");
      block.textContent = part.replace(/^[^\n]*\n?/, "").replace(/\n$/, "");
      return block;
    });
    this.body.replaceChildren(...parts.filter((part) => part.textContent));
    if (isAtEnd) list().scrollTop = list().scrollHeight;
  }
}

export function clearMessages() {
  list()
    .querySelectorAll(".message")
    .forEach((message) => message.remove());
  document.getElementById("welcome").hidden = false;
}
