package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
)

// accountWorld is one bot account whose configuration and database a test changes between runs.
type accountWorld struct {
	*world
	dir    string
	userID id.UserID
	config botproc.Config
}

func newAccountWorld(t *testing.T) *accountWorld {
	t.Helper()
	w := theWorld(t)
	a := &accountWorld{world: w, dir: t.TempDir()}
	a.userID = id.NewUserID(must(w.register(within(t, patience), "account"))(t), "localhost")
	a.config = botproc.Config{
		"homeserver": botproc.Config{"address": w.server.URL},
		"account":    botproc.Config{"user_id": a.userID.String(), "password": password},
		"database":   botproc.Config{"type": "sqlite3-fk-wal-fullsync", "uri": "file:" + filepath.Join(a.dir, "bot.db") + "?_txlock=immediate"},
		"encryption": botproc.Config{"pickle_key": "the pickle key of these tests"},
		"logging":    botproc.Config{"min_level": "debug", "writers": []botproc.Config{{"type": "stdout", "format": "json"}}},
	}
	return a
}

func (a *accountWorld) account() botproc.Config { return a.config["account"].(botproc.Config) }

// run starts the bot and stops it when it is ready, or lets it end. It gives the exit code and what it wrote to standard error.
func (a *accountWorld) run(t *testing.T, arguments ...string) (exitCode int, stderr string) {
	t.Helper()
	written := must(yaml.Marshal(a.config))(t)
	ok(t, os.WriteFile(filepath.Join(a.dir, "config.yaml"), written, 0o600))
	ctx, cancel := context.WithCancel(within(t, patience))
	defer cancel()
	cmd := exec.CommandContext(ctx, a.binary, append([]string{"-c", "config.yaml"}, arguments...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.Dir = a.dir
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	stdout := must(cmd.StdoutPipe())(t)
	ok(t, cmd.Start())
	log := must(io.ReadAll(&untilReady{Reader: stdout, stop: cancel}))(t)
	err := cmd.Wait()
	var exited *exec.ExitError
	if err != nil && !errors.As(err, &exited) && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	for _, secret := range []string{password, "the pickle key of these tests"} {
		if strings.Contains(string(log)+complaints.String(), secret) {
			t.Errorf("a secret is in the output")
		}
	}
	return cmd.ProcessState.ExitCode(), complaints.String()
}

// untilReady stops the bot as soon as its log says that it is ready.
type untilReady struct {
	io.Reader
	stop func()
	// tail is the end of what was read: the message may come in two parts.
	tail []byte
}

func (u *untilReady) Read(p []byte) (int, error) {
	n, err := u.Reader.Read(p)
	u.tail = append(u.tail, p[:n]...)
	if bytes.Contains(u.tail, []byte(botproc.ReadyMessage)) {
		u.stop()
	}
	u.tail = u.tail[max(0, len(u.tail)-len(botproc.ReadyMessage)):]
	return n, err
}

// starts expects the bot to get ready and to end with 0.
func (a *accountWorld) starts(t *testing.T) (stderr string) {
	t.Helper()
	exitCode, stderr := a.run(t)
	if exitCode != 0 {
		t.Fatalf("the bot ended with %d: %s", exitCode, stderr)
	}
	return stderr
}

// refuses expects the bot to end with 2 and one line that contains the words.
func (a *accountWorld) refuses(t *testing.T, words ...string) {
	t.Helper()
	exitCode, stderr := a.run(t)
	if exitCode != 2 {
		t.Errorf("the bot ended with %d", exitCode)
	}
	if lines := strings.Count(strings.TrimSpace(stderr), "\n") + 1; lines != 1 {
		t.Errorf("the complaint has %d lines: %s", lines, stderr)
	}
	for _, word := range words {
		if !strings.Contains(stderr, word) {
			t.Errorf("%q is not in the complaint: %s", word, stderr)
		}
	}
}

func (a *accountWorld) loseDatabase(t *testing.T) {
	t.Helper()
	for _, file := range must(filepath.Glob(filepath.Join(a.dir, "bot.db*")))(t) {
		ok(t, os.Remove(file))
	}
}

// device is a login of the bot's account by somebody else.
func (a *accountWorld) device(t *testing.T) *mautrix.Client {
	t.Helper()
	client := must(mautrix.NewClient(a.server.URL, "", ""))(t)
	must(client.Login(within(t, patience), &mautrix.ReqLogin{
		Type: mautrix.AuthTypePassword, Identifier: mautrix.UserIdentifier{Type: mautrix.IdentifierTypeUser, User: a.userID.String()},
		Password: password, StoreCredentials: true,
	}))(t)
	return client
}

func (a *accountWorld) masterKey(t *testing.T) id.Ed25519 {
	t.Helper()
	client := a.device(t)
	keys := must(client.QueryKeys(within(t, patience), &mautrix.ReqQueryKeys{DeviceKeys: mautrix.DeviceKeysRequest{a.userID: {}}}))(t)
	must(client.Logout(within(t, patience)))(t)
	master := keys.MasterKeys[a.userID]
	return master.FirstKey()
}

// recoveryKeyIn finds the key that the bot printed.
func recoveryKeyIn(t *testing.T, stderr string) string {
	t.Helper()
	for line := range strings.Lines(stderr) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "Es") && len(line) > 50 {
			return line
		}
	}
	t.Fatalf("no recovery key was printed: %q", stderr)
	return ""
}

func TestAccountKeepsItsIdentity(t *testing.T) {
	t.Parallel()
	a := newAccountWorld(t)
	recoveryKey := recoveryKeyIn(t, a.starts(t))
	identity := a.masterKey(t)
	if identity == "" {
		t.Fatal("the bot made no identity")
	}

	if again := a.starts(t); strings.Contains(again, "recovery key") {
		t.Errorf("the recovery key was shown again: %s", again)
	}

	// Without the secret keys, nothing is replaced.
	a.loseDatabase(t)
	a.refuses(t, "recovery_key", "reset_identity", identity.String())
	if now := a.masterKey(t); now != identity {
		t.Fatalf("the identity was replaced by %s", now)
	}

	// A key of somebody else's does not open it.
	a.account()["recovery_key"] = "EsTx oooo oooo"
	a.refuses(t, "account.recovery_key")

	a.account()["recovery_key"] = recoveryKey
	a.starts(t)
	if now := a.masterKey(t); now != identity {
		t.Fatalf("the identity was replaced by %s", now)
	}

	delete(a.account(), "recovery_key")
	a.starts(t) // it has the secret keys again

	a.loseDatabase(t)
	a.account()["reset_identity"] = true
	a.starts(t)
	replaced := a.masterKey(t)
	if replaced == identity {
		t.Fatal("reset_identity did not replace the identity")
	}
	a.starts(t)
	if now := a.masterKey(t); now != replaced {
		t.Error("reset_identity replaced the identity at a second start")
	}
}

func TestGeneratedRecoveryKeyGoesToTheConfiguration(t *testing.T) {
	t.Parallel()
	a := newAccountWorld(t)
	a.account()["recovery_key"] = "generate"
	if stderr := a.starts(t); strings.Contains(stderr, "recovery key") {
		t.Errorf("the recovery key was printed, too: %s", stderr)
	}
	path := filepath.Join(a.dir, "config.yaml")
	if mode := must(os.Stat(path))(t).Mode().Perm(); mode != 0o600 {
		t.Errorf("the configuration has mode %o", mode)
	}
	var written botproc.Config
	ok(t, yaml.Unmarshal(must(os.ReadFile(path))(t), &written))
	recoveryKey, _ := written["account"].(botproc.Config)["recovery_key"].(string)
	if !strings.HasPrefix(recoveryKey, "Es") {
		t.Fatal("the recovery key was not written into the configuration")
	}
	identity := a.masterKey(t)
	a.loseDatabase(t)
	a.account()["recovery_key"] = recoveryKey
	a.starts(t)
	if a.masterKey(t) != identity {
		t.Error("the written recovery key did not restore the identity")
	}
}

func TestBotUsesAnExistingToken(t *testing.T) {
	t.Parallel()
	a := newAccountWorld(t)
	client := a.device(t)
	delete(a.account(), "password")
	a.account()["access_token"] = client.AccessToken
	a.starts(t)

	a.account()["device_id"] = "OTHER"
	a.refuses(t, "account.device_id", client.DeviceID.String())
	delete(a.account(), "device_id")

	other := a.device(t)
	a.account()["access_token"] = other.AccessToken
	a.refuses(t, "account.access_token", other.DeviceID.String(), client.DeviceID.String())

	a.account()["access_token"] = "syt_nobody_knows_this"
	a.refuses(t, "account.access_token", "does not know it")

	stranger := must(people2Token(within(t, patience), a))(t)
	a.account()["access_token"] = stranger
	a.refuses(t, "account.access_token", a.userID.String())
}

// people2Token gives the token of another account.
func people2Token(ctx context.Context, a *accountWorld) (string, error) {
	localpart, err := a.register(ctx, "stranger")
	if err != nil {
		return "", err
	}
	body, err := json.Marshal(map[string]any{
		"type": "m.login.password", "password": password, "identifier": map[string]any{"type": "m.id.user", "user": localpart},
	})
	if err != nil {
		return "", err
	}
	resp, err := http.Post(a.server.URL+"/_matrix/client/v3/login", "application/json", bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var login mautrix.RespLogin
	if err = json.NewDecoder(resp.Body).Decode(&login); err != nil {
		return "", err
	}
	if login.AccessToken == "" {
		return "", fmt.Errorf("failed to log in: HTTP %d", resp.StatusCode)
	}
	return login.AccessToken, nil
}

func TestBotRefusesWhatDoesNotFitItsDatabase(t *testing.T) {
	t.Parallel()
	a := newAccountWorld(t)
	a.starts(t)

	a.config["encryption"].(botproc.Config)["pickle_key"] = "another pickle key of these tests"
	a.refuses(t, "encryption.pickle_key")
	a.config["encryption"].(botproc.Config)["pickle_key"] = "the pickle key of these tests"

	other := must(a.register(within(t, patience), "other"))(t)
	a.account()["user_id"] = id.NewUserID(other, "localhost").String()
	a.refuses(t, "database.uri", a.userID.String())
	a.account()["user_id"] = a.userID.String()

	a.account()["password"] = "not the password of anybody"
	a.refuses(t, "account.password")
	a.account()["password"] = password

	// The device is deleted by another one: its keys are gone from the server, and must not be made up again.
	client := a.device(t)
	devices := must(client.GetDevicesInfo(within(t, patience)))(t)
	for _, device := range devices.Devices {
		if device.DeviceID == client.DeviceID {
			continue
		}
		ok(t, client.DeleteDevice(within(t, patience), device.DeviceID, &mautrix.ReqDeleteDevice[any]{Auth: mautrix.ReqUIAuthLogin{
			BaseAuthData: mautrix.BaseAuthData{Type: mautrix.AuthTypePassword}, User: a.userID.String(), Password: password,
		}}))
	}
	a.refuses(t, "was deleted on the server")
}

func TestCheckSaysWhetherTheHomeserverAnswers(t *testing.T) {
	t.Parallel()
	a := newAccountWorld(t)
	if exitCode, stderr := a.run(t, "--check"); exitCode != 0 {
		t.Errorf("ended with %d: %s", exitCode, stderr)
	}
	a.config["homeserver"] = botproc.Config{"address": "http://127.0.0.1:1"}
	if exitCode, stderr := a.run(t, "--check"); exitCode != 2 || !strings.Contains(stderr, "homeserver.address") {
		t.Errorf("ended with %d: %s", exitCode, stderr)
	}
}
