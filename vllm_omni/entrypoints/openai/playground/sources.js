// Pictures that go along with a prompt: chosen, dropped or pasted.
import { Tray } from "./attachments.js";
import { el, button, icon } from "./dom.js";
import { showError } from "./fields.js";

export class Sources extends Tray {
  /** `facts` is what /v1/omni/info says of what goes in; `param` the field of the request; `changed` is called. */
  constructor(form, param, label, model, facts, changed) {
    super(el("ul", { className: "attached", "aria-label": label }), model, facts);
    [this.form, this.param, this.changed] = [form, param, changed];
    const many = (facts.inputs.image ?? 0) > 1;
    this.input = el("input", { type: "file", accept: "image/*", multiple: many, hidden: true, id: `${param}-files`, "aria-label": label });
    this.choose = button(`Choose, drop or paste ${many ? "pictures" : "a picture"}`, () => this.input.click(), { className: "drop" }, icon("clip"));
    const title = el("p", { className: "label", id: `${param}-label` }, `${label} `, el("span", { className: "dim" }, "optional"));
    const error = el("p", { className: "error", id: `${param}-error` });
    this.element = el("div", { className: "field sources" }, title, this.list, this.choose, this.input, error);
    this.element.dataset.param = param;
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-labelledby", title.id);
    this.element.hidden = !("image" in facts.inputs);
    if (!this.element.hidden) this.listen();
  }

  listen() {
    this.input.addEventListener("change", () => {
      this.take(this.input.files);
      this.input.value = "";
    });
    this.form.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length === 0) return;
      event.preventDefault();
      this.take(event.clipboardData.files);
    });
    for (const kind of ["dragover", "dragleave", "drop"]) {
      this.form.addEventListener(kind, (event) => {
        event.preventDefault();
        this.element.classList.toggle("over", kind === "dragover");
        if (kind === "drop") this.take(event.dataTransfer.files);
      });
    }
  }

  async take(files) {
    showError(this.form, this.param, "");
    for (const file of files) {
      try {
        await this.add(file);
      } catch (error) {
        showError(this.form, this.param, error.message);
      }
    }
  }

  set(files) {
    super.set(files);
    this.choose.hidden = this.facts.inputs.image <= files.length;
    this.changed();
  }
}
