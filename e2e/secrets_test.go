package e2e

import (
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/secrets"
)

// The bot logs at its finest level while it reads fresh sessions, misses a key, and is started with a wrong password and a wrong
// database: nothing that it writes or says holds a secret, and only its own user may read its files.
func TestSecretsStayIn(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	dir := must(os.MkdirTemp(w.dir, "secrets-"))(t)
	logs, data := filepath.Join(dir, "logs"), filepath.Join(dir, "data")
	trace := filepath.Join(logs, "trace.log")
	listen := freeAddress(t)
	bot := must(w.startBot(within(t, patience), dir, func(config botproc.Config) {
		config["metrics"] = botproc.Config{"listen": listen}
		config["database"].(botproc.Config)["uri"] = "file:" + filepath.Join(data, "bot.db") + "?_txlock=immediate"
		config["encryption"].(botproc.Config)["wait"] = "1s"
		config["logging"] = botproc.Config{"min_level": "trace", "writers": []botproc.Config{
			{"type": "stdout", "format": "json"}, {"type": "file", "format": "json", "filename": trace},
		}}
	}))(t)
	t.Cleanup(bot.Kill)

	set := secrets.NewSet()
	ok(t, set.AddText(secrets.Body, "what people say", mark))
	said := append(playSecrets(t, w, bot, set), fetch(t, "http://"+listen+"/metrics"))
	ok(t, set.Collect(t.Context(), bot.ConfigPath())) // while it runs
	expectPrivate(t, dir, "config.yaml", "bot.db", "bot.db-wal", "bot.db-shm", "bot.db.lock", "trace.log")
	_, _, err := bot.Stop(within(t, patience))
	ok(t, err)
	ok(t, set.Collect(t.Context(), bot.ConfigPath()))
	for _, kind := range []secrets.Kind{
		secrets.Password, secrets.RecoveryKey, secrets.PickleKey, secrets.DeviceKey, secrets.OneTimeKey, secrets.OlmSession,
		secrets.MegolmSession, secrets.StoredSecret, secrets.Body,
	} {
		if set.Count(kind) == 0 {
			t.Errorf("no %s was collected, so that none can be looked for", kind)
		}
	}
	said = append(said, expectCheck(t, w, bot, 0, "the settings and the connection are fine"))
	said = append(said, mislead(t, w, bot, set)...)

	for _, text := range append(said, bot.Log()...) {
		for _, hit := range set.ScanText("what the bot says", text) {
			t.Error(hit)
		}
	}
	hits := must(set.ScanFolder(logs))(t)
	for _, hit := range hits {
		t.Error(hit)
	}
	var written string
	for _, log := range must(filepath.Glob(filepath.Join(logs, "*.log")))(t) { // one for each start
		written += string(must(os.ReadFile(log))(t))
	}
	if !contains(written, `"level":"trace"`, "Received a room key", "Request completed") {
		t.Error("the log holds less than it should, so that it proves nothing")
	}
	if broken := written + "\nsession_key " + w.planted(t, set); len(set.ScanText("a broken log", broken)) == 0 {
		t.Error("a secret in this log would not have been found")
	}
}

// freeAddress gives an address that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	listener := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	ok(t, listener.Close())
	return listener.Addr().String()
}

// fetch gives what is at a URL.
func fetch(t *testing.T, url string) string {
	t.Helper()
	resp := must(http.DefaultClient.Do(must(http.NewRequestWithContext(within(t, patience), http.MethodGet, url, nil))(t)))(t)
	defer resp.Body.Close()
	text := string(must(io.ReadAll(resp.Body))(t))
	if resp.StatusCode != http.StatusOK || !contains(text, "sendertrust_answers_total") {
		t.Errorf("%s answers %s: %s", url, resp.Status, text)
	}
	return text
}

// planted gives a secret of the set.
func (w *world) planted(t *testing.T, set *secrets.Set) string {
	t.Helper()
	person := w.newPerson(t, "planted")
	session := must(person.NewSession("!planted:localhost"))(t)
	ok(t, set.AddSessionKey("a planted session", session.Key))
	return session.Key[20:80]
}

// playSecrets has somebody say things to the bot, adds the keys to the set, and gives what the bot answers.
func playSecrets(t *testing.T, w *world, bot *botproc.Bot, set *secrets.Set) (said []string) {
	t.Helper()
	ctx := within(t, patience)
	alice, _ := w.newStranger(t, "alice")
	room := newRoom(t, true, bot, alice)
	for i := range 3 {
		alice.RotateSession(room)
		eventID := must(alice.Send(ctx, room, say(fmt.Sprint("secret ", i))))(t)
		session := must(alice.CurrentSession(ctx, room))(t)
		ok(t, set.AddSessionKey("alice's session", session.Key))
		answer := must(alice.WaitForAnswer(ctx, eventID))(t)
		said = append(said, fmt.Sprintf("%+v", *answer))
	}
	missing, session, err := alice.SendWithoutKey(ctx, room, say("can you hear me?"))
	ok(t, err)
	ok(t, set.AddSessionKey("alice's session that she keeps", session.Key))
	clear := must(alice.SendClear(ctx, room, say("oops")))(t)
	for _, eventID := range []id.EventID{clear, missing} {
		answer := must(alice.WaitForAnswer(ctx, eventID))(t)
		said = append(said, fmt.Sprintf("%+v", *answer))
	}
	return said
}

// mislead starts the bot with settings that are wrong, and gives what it says.
func mislead(t *testing.T, w *world, bot *botproc.Bot, set *secrets.Set) (said []string) {
	t.Helper()
	const wrongPassword, wrongToken, wrongDatabase = "wrong-horse-battery-staple", "syt_wrong_token_of_nobody", "sesame-open-wide"
	ok(t, set.AddText(secrets.Password, "a mistake", wrongPassword))
	ok(t, set.AddText(secrets.AccessToken, "a mistake", wrongToken))
	ok(t, set.AddText(secrets.DatabasePassword, "a mistake", wrongDatabase))
	account := func(key, value string) func(botproc.Config) {
		return func(config botproc.Config) { config["account"].(botproc.Config)[key] = value }
	}

	ok(t, bot.Reconfigure(account("password", wrongPassword)))
	ok(t, bot.Launch())
	<-bot.Exited()
	if bot.ExitCode() != 2 || len(bot.LogMentioning("account.password", "refuses")) == 0 {
		t.Errorf("with a wrong password the bot ended with %d:\n%s", bot.ExitCode(), bot.Tail(3))
	}
	ok(t, bot.Reconfigure(account("access_token", wrongToken)))
	said = append(said, expectCheck(t, w, bot, 2, "account.access_token"))

	database := func(uri string) {
		ok(t, bot.Reconfigure(func(config botproc.Config) { config["database"] = botproc.Config{"type": "postgres", "uri": uri} }))
	}
	database("postgres://bot:" + wrongDatabase + "@127.0.0.1:1/none?connect_timeout=2")
	said = append(said, expectCheck(t, w, bot, 2, "database.uri"))
	ok(t, bot.Launch())
	ok(t, bot.WaitForLog(within(t, patience), "The database cannot be reached"))
	_, _, err := bot.Stop(within(t, patience))
	ok(t, err)
	database("postgres://bot:" + wrongDatabase + "%zz@127.0.0.1:1/none")
	return append(said, expectCheck(t, w, bot, 2, "database.uri"))
}

// expectCheck gives what --check says.
func expectCheck(t *testing.T, w *world, bot *botproc.Bot, code int, words ...string) string {
	t.Helper()
	cmd := exec.CommandContext(within(t, patience), w.binary, "-c", bot.ConfigPath(), "--check")
	output, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != code || !contains(string(output), words...) {
		t.Errorf("--check ended with %v, and does not say %q:\n%s", err, words, output)
	}
	return string(output)
}

// expectPrivate makes sure that only the user may read what is in a folder, and that these files are.
func expectPrivate(t *testing.T, dir string, files ...string) {
	t.Helper()
	found := map[string]bool{}
	ok(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		want := fs.FileMode(0o600)
		if entry.IsDir() {
			want = 0o700
		}
		if mode := must(entry.Info())(t).Mode().Perm(); mode != want {
			t.Errorf("%s has mode %o, not %o", path, mode, want)
		}
		found[entry.Name()] = true
		return nil
	}))
	for _, file := range files {
		if !found[file] {
			t.Errorf("there is no %s, only %v", file, found)
		}
	}
}

// A file that somebody has given everybody rights to is named, and left as it is.
func TestExposedDatabaseIsToldOf(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	bot := w.newBot(t, nil)
	_, _, err := bot.Stop(within(t, patience))
	ok(t, err)
	ok(t, os.Chmod(bot.DBPath(), 0o644))
	expectCheck(t, w, bot, 0, "warning: Everybody on this machine can get at "+bot.DBPath(), "chmod o= ")
	ok(t, bot.Restart(within(t, patience)))
	if warned := bot.LogMentioning(`"level":"warn"`, "can get at "+bot.DBPath()+","); len(warned) != 1 {
		t.Errorf("the bot does not warn of it at its start, or more than once: %q", warned)
	}
	if mode := must(os.Stat(bot.DBPath()))(t).Mode().Perm(); mode != 0o644 {
		t.Errorf("the mode was changed to %o", mode)
	}
}
