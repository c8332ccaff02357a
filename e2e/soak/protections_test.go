package soak

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sendertrust/e2e/botproc"
)

// protection is one of those that keep kills from hurting, and how to build the bot without it.
type protection struct {
	file, with, without string
	// points are where the bot has to die for the lack to show, and deaths how often at each.
	points []string
	deaths int
}

// protections are taken away by changing the source while it is compiled; what is in the checkout stays as it is.
var protections = map[string]protection{
	// Whatever is flushed while a room key is half received takes that half along.
	"gate": {
		file: "cryptohook/unitofwork.go", with: "if !u.withoutGate {", without: "if false {",
		points: []string{"decrypted"}, deaths: 20,
	},
	// Olm messages leave before the ratchets that they were encrypted with are durable.
	"barrier": {
		file: "cryptohook/transport.go", with: `if strings.Contains(path, "/sendToDevice/") {`, without: `if strings.Contains(path, "/no such path/") {`,
		points: []string{"answering", "answered", "handled"}, deaths: 8,
	},
	// The sync token is durable before what came with it is, as mautrix has it.
	"token": {
		file:    "cryptohook/sync.go",
		with:    "func (tokenStore) SaveNextBatch(context.Context, id.UserID, string) error { return nil }",
		without: "func (t tokenStore) SaveNextBatch(ctx context.Context, _ id.UserID, token string) error { return t.hook.uow.SQLCryptoStore.PutNextBatch(ctx, token) }",
		points:  []string{"received", "begun", "written"}, deaths: 4,
	},
	// What the process before has received, and not handled, is forgotten.
	"inbox": {
		file: "cryptohook/inbox.go", with: "	var loaded int64\n", without: "	loaded := in.lastSeq.Load()\n",
		points: []string{"synced", "judged", "answering"}, deaths: 4,
	},
}

// buildWithout builds the bot with a protection taken away.
func (w *world) buildWithout(t *testing.T, name string) (binary string) {
	t.Helper()
	p, known := protections[name]
	if !known {
		t.Fatalf("there is no protection %q", name)
	}
	path := filepath.Join(w.root, filepath.FromSlash(p.file))
	source := string(must(os.ReadFile(path))(t))
	if strings.Count(source, p.with) != 1 {
		t.Fatalf("%s has changed: %q is in it %d times", p.file, p.with, strings.Count(source, p.with))
	}
	dir := must(os.MkdirTemp(w.dir, "without-"))(t)
	changed, overlay := filepath.Join(dir, "changed.go"), filepath.Join(dir, "overlay.json")
	ok(t, os.WriteFile(changed, []byte(strings.Replace(source, p.with, p.without, 1)), 0o600))
	ok(t, os.WriteFile(overlay, must(json.Marshal(map[string]any{"Replace": map[string]string{path: changed}}))(t), 0o600))
	arguments := append([]string{"-overlay", overlay}, withFaultPoints...)
	return must(botproc.BuildWith(within(t, startPatience), w.root, filepath.Join(dir, "sendertrust"), arguments...))(t)
}

// What the kills are worth: with any of the protections taken away, they find something lost, doubled or wrong.
func TestKillsNoticeWhenAProtectionIsMissing(t *testing.T) {
	if !*full {
		t.Skip("only with -full")
	}
	w := theWorld(t)
	for name, p := range protections {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			binary := w.buildWithout(t, name)
			c := newCrowd(t, w, false)
			c.patience = lostPatience
			pin := c.pin()
			v := &victim{name: "without the " + name, Bot: w.newBot(t, botOptions{binary: binary, configure: func(config botproc.Config) {
				pin(config)
				config["encryption"].(botproc.Config)["wait"] = "3s"
			}})}
			c.meet(v.UserID)
			for _, r := range c.play(100, 0, p.deaths, p.points, v) {
				t.Logf("without the %s: %d messages: %d held, %d lost, %d doubled, %d wrong", name, r.messages, r.held, r.lost, r.doubled, r.wrong)
				if r.lost+r.doubled+r.wrong == 0 {
					t.Errorf("nothing was noticed of the missing %s", name)
				}
			}
		})
	}
}
