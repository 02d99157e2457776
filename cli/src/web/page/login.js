// Asks for the password, in exchange for a cookie that no script can read.

const form = document.getElementById("login");
const password = document.getElementById("password");
const problem = document.getElementById("problem");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  problem.textContent = "";
  try {
    const answer = await fetch("/api/login", {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Florence": "1" },
      body: JSON.stringify({ password: password.value }),
    });
    if (answer.ok) {
      location.reload();
      return;
    }
    problem.textContent = (await answer.json()).error;
  } catch {
    problem.textContent = "The page's server does not answer.";
  }
  password.select();
});
