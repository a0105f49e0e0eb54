/** Light and dark: by the browser's setting, or as the user chose here. */

const CHOICES = ["auto", "light", "dark"];
const KEY = "tiue-theme";

/** Let a button go through the choices. The choice is remembered. */
export function chooseTheme(button) {
  let choice = localStorage.getItem(KEY);
  const show = () => {
    if (!CHOICES.includes(choice)) choice = "auto";
    document.documentElement.dataset.theme = choice;
    button.textContent = `Theme: ${choice}`;
  };
  button.addEventListener("click", () => {
    choice = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
    localStorage.setItem(KEY, choice);
    show();
  });
  show();
}
