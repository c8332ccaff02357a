package cryptohook_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// homeserver has one encrypted room, and one message in it that somebody sent in the clear.
func homeserver() *httptest.Server {
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch {
		case strings.HasSuffix(req.URL.Path, "/filter"):
			fmt.Fprint(w, `{"filter_id": "1"}`)
		case strings.HasSuffix(req.URL.Path, "/keys/upload"):
			fmt.Fprint(w, `{"one_time_key_counts": {"signed_curve25519": 50}}`)
		case strings.HasSuffix(req.URL.Path, "/sync") && req.URL.Query().Get("since") == "":
			fmt.Fprint(w, `{"next_batch": "1", "device_one_time_keys_count": {"signed_curve25519": 50}, "rooms": {"join": {"!room:example.org": {"state": {"events": [
				{"type": "m.room.encryption", "state_key": "", "sender": "@alice:example.org", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}
			]}}}}}`)
		case strings.HasSuffix(req.URL.Path, "/sync") && req.URL.Query().Get("since") == "1":
			fmt.Fprint(w, `{"next_batch": "2", "device_one_time_keys_count": {"signed_curve25519": 50}, "rooms": {"join": {"!room:example.org": {"timeline": {"events": [
				{"type": "m.room.message", "event_id": "$1", "sender": "@alice:example.org", "content": {"msgtype": "m.text", "body": "open the door"}}
			]}}}}}`)
		default:
			select {
			case <-req.Context().Done():
			case <-time.After(time.Second):
			}
			fmt.Fprint(w, `{"next_batch": "2", "device_one_time_keys_count": {"signed_curve25519": 50}}`)
		}
	}))
}

func Example() {
	server := homeserver()
	defer server.Close()
	dir, err := os.MkdirTemp("", "cryptohook")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	db, err := dbutil.NewWithDialect("file:"+filepath.Join(dir, "example.db")+"?_txlock=immediate", "sqlite3-fk-wal-fullsync")
	if err != nil {
		panic(err)
	}
	defer db.Close()
	client, err := mautrix.NewClient(server.URL, "@bot:example.org", "token")
	if err != nil {
		panic(err)
	}
	client.DeviceID = "BOT"

	ctx, cancel := context.WithCancel(context.Background())
	hook, err := cryptohook.Install(ctx, client, cryptohook.Options{DB: db, PickleKey: []byte("pickle key")})
	if err != nil {
		panic(err)
	}
	client.Syncer.(mautrix.ExtensibleSyncer).OnEventType(event.EventMessage, func(ctx context.Context, evt *event.Event) {
		verdict, ok := cryptohook.VerdictOf(evt)
		if ok && verdict.Code == cryptohook.CodeVerified {
			fmt.Println("obeying", verdict.UserID)
		} else {
			fmt.Printf("not obeying %s: %s (%s)\n", evt.Sender, verdict.Code, verdict.Code.LaxShield())
		}
		cancel()
	})
	if err = hook.Run(ctx); err != nil {
		panic(err)
	}
	// Output: not obeying @alice:example.org: sent_in_clear (red)
}

// asInTheDocumentation is the example on the package's first screen.
func asInTheDocumentation(ctx context.Context, client *mautrix.Client, db *dbutil.Database, pickleKey []byte) error {
	obey := func(id.UserID, string) {}
	hook, err := cryptohook.Install(ctx, client, cryptohook.Options{DB: db, PickleKey: pickleKey})
	if err != nil {
		return err
	}
	client.Syncer.(mautrix.ExtensibleSyncer).OnEventType(event.EventMessage, func(ctx context.Context, evt *event.Event) {
		verdict, ok := cryptohook.VerdictOf(evt)
		if ok && verdict.Code == cryptohook.CodeVerified {
			obey(verdict.UserID, evt.Content.AsMessage().Body)
		}
	})
	return hook.Run(ctx)
}

// The lines on the package's first screen compile: they stand in asInTheDocumentation word for word.
func TestDocumentationCompiles(t *testing.T) {
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	this, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var shown strings.Builder
	for line := range strings.Lines(string(doc)) {
		if code, isCode := strings.CutPrefix(line, "//\t"); isCode {
			shown.WriteString("\t" + code)
		}
	}
	if shown.Len() == 0 || !strings.Contains(string(this), shown.String()) {
		t.Errorf("the example in doc.go is not that of asInTheDocumentation:\n%s", shown.String())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	client, err := mautrix.NewClient("http://127.0.0.1:1", "@bot:example.org", "")
	if err != nil {
		t.Fatal(err)
	}
	if err = asInTheDocumentation(ctx, client, nil, nil); err == nil {
		t.Error("a client that is not logged in was accepted")
	}
}
