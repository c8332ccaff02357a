package cryptohook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"go.mau.fi/util/dbutil"
	"gopkg.in/yaml.v3"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/id"
)

// stepRow is one walk of testdata/steps.yaml, which explains the words.
type stepRow struct {
	Name     string   `yaml:"name"`
	Embedded string   `yaml:"embedded"`
	Cached   []string `yaml:"cached"`
	Identity string   `yaml:"identity"`
	Current  bool     `yaml:"current"`
	Seen     []string `yaml:"seen"`
	Retry    *int     `yaml:"retry"`
	Want     struct {
		Path   string `yaml:"path"`
		State  State  `yaml:"state"`
		Reason string `yaml:"reason"`
		Count  int    `yaml:"count"`
		Next   string `yaml:"next"`
		Keys   string `yaml:"keys"`
	} `yaml:"want"`
}

// stepWorld is the user of the table, and a real store with what we know of her.
type stepWorld struct {
	t        *testing.T
	store    *store
	alice    *actor
	device   *actorDevice
	other    *actorDevice
	oldSSK   olm.PKSigning
	stranger olm.PKSigning
	eve      *actor
	anchor   trustAnchor
}

func newTestStore(t *testing.T) *store {
	t.Helper()
	db := must(openDatabase("sqlite3-fk-wal", newDatabase(t)))
	t.Cleanup(func() { _ = db.Close() })
	s := newStore(db, dbutil.NoopLogger)
	if err := s.Upgrade(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

func newStepWorld(t *testing.T) *stepWorld {
	w := &stepWorld{
		t: t, store: newTestStore(t), alice: newActor("@alice:test"), eve: newActor("@eve:test"),
		oldSSK: must(olm.NewPKSigning()), stranger: must(olm.NewPKSigning()),
		anchor: trustAnchor{userID: "@bot:test", masterKey: "botmaster", userSigningKey: "botusk"},
	}
	w.device = w.alice.addDevice("DEVICE")
	w.other = w.alice.addDevice("OTHER")
	return w
}

// deviceKeys makes the device keys object of one of the words.
func (w *stepWorld) deviceKeys(word string) json.RawMessage {
	ssk := w.alice.selfSigningKey().String()
	keys := w.device.selfSignedKeys()
	switch word {
	case "unsigned":
	case "signed":
		signInto(keys, w.alice.userID, ssk, w.alice.selfSigning)
	case "old_signed":
		signInto(keys, w.alice.userID, w.oldSSK.PublicKey().String(), w.oldSSK)
	case "both_signed":
		signInto(keys, w.alice.userID, w.oldSSK.PublicKey().String(), w.oldSSK)
		signInto(keys, w.alice.userID, ssk, w.alice.selfSigning)
	case "stranger":
		signInto(keys, w.alice.userID, w.stranger.PublicKey().String(), w.stranger)
	case "by_other":
		signInto(keys, w.eve.userID, w.eve.selfSigningKey().String(), w.eve.selfSigning)
	case "forged":
		putSignature(keys, w.alice.userID, ssk, forgedSignature())
	case "altered":
		genuine := must(w.alice.selfSigning.SignJSON(keys))
		delete(keys, "signatures")
		keys["algorithms"] = []any{string(id.AlgorithmOlmV1)}
		signInto(keys, w.alice.userID, w.device.deviceID.String(), w.device.account)
		putSignature(keys, w.alice.userID, ssk, genuine)
	case "other_key":
		keys = w.other.selfSignedKeys()
		delete(keys, "signatures")
		keys["keys"].(object)["curve25519:"+w.other.deviceID.String()] = w.device.senderKey().String()
		signInto(keys, w.alice.userID, w.other.deviceID.String(), w.other.account)
		signInto(keys, w.alice.userID, ssk, w.alice.selfSigning)
	case "other_user":
		delete(keys, "signatures")
		keys["user_id"] = w.eve.userID.String()
		signInto(keys, w.eve.userID, w.device.deviceID.String(), w.device.account)
		signInto(keys, w.eve.userID, w.eve.selfSigningKey().String(), w.eve.selfSigning)
	case "ssk_name", "ssk_stranger":
		w.device.deviceID = id.DeviceID(ssk)
		keys = w.device.selfSignedKeys()
		if word == "ssk_stranger" {
			signInto(keys, w.alice.userID, w.stranger.PublicKey().String(), w.stranger)
		}
	case "junk":
		return json.RawMessage(`{"user_id": 5}`)
	default:
		w.t.Fatalf("unknown word %q", word)
	}
	return rawJSON(keys)
}

// cache publishes a device of one of the words; deviceID keeps several apart.
func (w *stepWorld) cache(word string, deviceID id.DeviceID) json.RawMessage {
	word, deleted := strings.CutPrefix(word, "deleted_")
	raw := w.deviceKeys(word)
	signingKey := w.device.signingKey()
	if word == "other_key" {
		signingKey = w.other.signingKey()
	}
	ctx := w.t.Context()
	if err := w.store.putDevices(ctx, []*publishedDevice{{
		userID: w.alice.userID, deviceID: deviceID, identityKey: w.device.senderKey(), signingKey: signingKey, raw: raw,
	}}); err != nil {
		w.t.Fatal(err)
	}
	if deleted {
		if err := w.store.markDevicesDeleted(ctx, []id.UserID{w.alice.userID}); err != nil {
			w.t.Fatal(err)
		}
	}
	return raw
}

func (w *stepWorld) know(word string) {
	identity := &Identity{UserID: w.alice.userID, MasterKey: w.alice.masterKey(), FirstMasterKey: w.alice.masterKey(), SelfSigningKey: w.alice.selfSigningKey()}
	switch word {
	case "none":
		return
	case "no_ssk":
		identity.SelfSigningKey = ""
	case "unverified":
	case "verified":
		identity.VerifiedBy, identity.WasVerified = w.anchor.userSigningKey, true
	case "violation":
		identity.FirstMasterKey, identity.WasVerified = "first", true
	case "pinned_otherwise":
		w.anchor.pins = map[id.UserID]id.Ed25519{w.alice.userID: "pinned"}
	case "verified_again":
		identity.FirstMasterKey, identity.VerifiedBy, identity.WasVerified = "first", w.anchor.userSigningKey, true
	default:
		w.t.Fatalf("unknown word %q", word)
	}
	if err := w.store.putIdentity(w.t.Context(), identity, time.Now()); err != nil {
		w.t.Fatal(err)
	}
}

// see has one of the self-signing keys have signed the device at some time.
func (w *stepWorld) see(word string) {
	signer := map[string]id.Ed25519{"signed": w.alice.selfSigningKey(), "old_signed": w.oldSSK.PublicKey()}[word]
	if signer == "" {
		w.t.Fatalf("unknown word %q", word)
	}
	_, err := w.store.putSignature(w.t.Context(), signature{w.alice.userID, w.device.senderKey(), w.device.signingKey(), signer}, nil)
	if err != nil {
		w.t.Fatal(err)
	}
}

func TestEveryEdgeOfTheSteps(t *testing.T) {
	var rows []stepRow
	decoder := yaml.NewDecoder(bytes.NewReader(must(os.ReadFile("testdata/steps.yaml"))))
	decoder.KnownFields(true)
	if err := decoder.Decode(&rows); err != nil {
		t.Fatal(err)
	}
	taken := make(map[string]bool)
	for _, row := range rows {
		t.Run(row.Name, func(t *testing.T) { walk(t, row) })
		for i := 1; i < len(row.Want.Path); i++ {
			taken[row.Want.Path[i-1:i+1]] = true
		}
	}
	for _, edge := range []string{"AD", "AB", "BD", "BC", "DE", "EF", "EG", "GH", "HJ"} {
		if !taken[edge] {
			t.Errorf("no row takes the edge %s", edge)
		}
	}
}

func walk(t *testing.T, row stepRow) {
	w := newStepWorld(t)
	now := time.UnixMilli(1_700_000_000_000)
	d := derivation{
		caches: w.store, now: now, jitter: 1, current: row.Current,
		data: SenderData{
			SessionID: "session", RoomID: "!room:test", Sender: w.alice.userID, Source: SourceDirect, Legacy: true,
			Reason: "an old reason",
		},
	}
	if row.Retry != nil {
		d.queried, d.current = true, true
		d.data.RetryCount, d.data.NextRetry = *row.Retry, now.Add(-time.Second)
		d.data.State = StateUnknownDevice
	}
	kept := map[string]json.RawMessage{"": nil}
	if row.Embedded != "" {
		d.embedded = w.deviceKeys(row.Embedded)
		kept["embedded"] = d.embedded
		if row.Retry != nil {
			d.data.State, d.data.DeviceKeys = StateDeviceInfo, d.embedded
		}
	}
	for i, word := range row.Cached {
		kept["cached"] = w.cache(word, id.DeviceID("DEVICE"+string(rune('0'+i))))
	}
	w.know(row.Identity)
	for _, word := range row.Seen {
		w.see(word)
	}
	d.anchor = w.anchor
	d.data.SenderKey, d.data.SigningKey = w.device.senderKey(), w.device.signingKey()

	got, err := d.derive(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := row.Want
	if string(d.path) != want.Path {
		t.Errorf("path %s, want %s", d.path, want.Path)
	}
	if got.State != want.State {
		t.Errorf("state %s, want %s", got.State, want.State)
	}
	reason := map[string]string{"": "", "owner_check_failed": "owner_check_failed", "forged": reasonForgedSignature}[want.Reason]
	if got.Reason != reason {
		t.Errorf("reason %q, want %q", got.Reason, reason)
	}
	if got.RetryCount != want.Count {
		t.Errorf("retry_count %d, want %d", got.RetryCount, want.Count)
	}
	var next time.Time
	switch want.Next {
	case "", "none":
	case "now":
		next = now
	default:
		next = now.Add(must(time.ParseDuration(want.Next)))
	}
	if !got.NextRetry.Equal(next) {
		t.Errorf("next_retry %v, want %v", got.NextRetry, next)
	}
	if !bytes.Equal(got.DeviceKeys, kept[want.Keys]) {
		t.Errorf("device keys %s, want those that are %q", got.DeviceKeys, want.Keys)
	}
	wantMaster, wantDevice, wantLegacy := id.Ed25519(""), id.DeviceID(""), true
	if want.State.proven() {
		wantMaster, wantLegacy = w.alice.masterKey(), false
	}
	if want.State != StateUnknownDevice {
		wantDevice = w.device.deviceID
	}
	if got.MasterKey != wantMaster || got.DeviceID != wantDevice {
		t.Errorf("device %q with master key %q, want %q with %q", got.DeviceID, got.MasterKey, wantDevice, wantMaster)
	}
	if got.Legacy != wantLegacy && want.State.proven() {
		t.Error("a proven session is still called legacy")
	}
}

func TestBackoffDoublesFromFiveSecondsToAnHourForTwelveTries(t *testing.T) {
	now := time.UnixMilli(1_700_000_000_000)
	d := derivation{now: now, jitter: 1, queried: true}
	var waits []time.Duration
	for range 20 {
		if _, err := d.wait(false); err != nil {
			t.Fatal(err)
		}
		if d.data.NextRetry.IsZero() {
			break
		}
		waits = append(waits, d.data.NextRetry.Sub(now))
	}
	want := []time.Duration{5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600}
	if len(waits) != len(want) {
		t.Fatalf("%d tries are scheduled, want 12: %v", len(waits), waits)
	}
	for i, wait := range waits {
		if wait != want[i]*time.Second {
			t.Errorf("try %d after %s, want %s", i+1, wait, want[i]*time.Second)
		}
	}
}

func TestJitterIsWithinAFifth(t *testing.T) {
	now := time.UnixMilli(1_700_000_000_000)
	least, most := time.Hour, time.Duration(0)
	store := newTestStore(t)
	for range 300 {
		d := derivation{caches: store, now: now, queried: true, data: SenderData{Sender: "@alice:test", SenderKey: "key"}}
		got, err := d.derive(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		wait := got.NextRetry.Sub(now)
		least, most = min(least, wait), max(most, wait)
	}
	if least < 4*time.Second || most > 6*time.Second {
		t.Errorf("waits from %s to %s, want 5 s ±20 %%", least, most)
	}
	if least > 4300*time.Millisecond || most < 5700*time.Millisecond {
		t.Errorf("waits from %s to %s: many sessions would ask at the same instant", least, most)
	}
}

// brokenCaches fails at every look-up.
type brokenCaches struct{}

var errBrokenCache = errors.New("no database")

func (brokenCaches) deviceByKey(context.Context, id.UserID, id.SenderKey, id.Ed25519) (json.RawMessage, error) {
	return nil, errBrokenCache
}
func (brokenCaches) identity(context.Context, id.UserID) (*Identity, error) {
	return nil, errBrokenCache
}
func (brokenCaches) signers(context.Context, id.UserID, id.SenderKey, id.Ed25519) ([]id.Ed25519, error) {
	return nil, errBrokenCache
}

func TestDerivationNamesTheStepThatFailed(t *testing.T) {
	w := newStepWorld(t)
	for embedded, want := range map[string]string{"": "step B", "signed": "step E", "unsigned": "step D"} {
		d := derivation{caches: brokenCaches{}, data: SenderData{Sender: w.alice.userID, SenderKey: w.device.senderKey(), SigningKey: w.device.signingKey()}}
		if embedded != "" {
			d.embedded = w.deviceKeys(embedded)
		}
		_, err := d.derive(t.Context())
		if !errors.Is(err, errBrokenCache) || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one at %s", err, want)
		}
	}
}

// brokenDevices fails only where the published devices are looked up.
type brokenDevices struct{ brokenCaches }

func (brokenDevices) signers(context.Context, id.UserID, id.SenderKey, id.Ed25519) ([]id.Ed25519, error) {
	return nil, nil
}

func TestPublishedDevicesThatCannotBeReadAreAnError(t *testing.T) {
	w := newStepWorld(t)
	d := derivation{caches: brokenDevices{}, embedded: w.deviceKeys("unsigned"), data: SenderData{
		Sender: w.alice.userID, SenderKey: w.device.senderKey(), SigningKey: w.device.signingKey(),
	}}
	if _, err := d.derive(t.Context()); !errors.Is(err, errBrokenCache) {
		t.Errorf("error %v", err)
	}
}

// Deriving twice from what is stored after the first walk must not depend on the walk: the row is all that there is.
func TestAProvenRowForgetsDeviceKeysAndRetries(t *testing.T) {
	w := newStepWorld(t)
	w.know("unverified")
	d := derivation{
		caches: w.store, anchor: w.anchor, now: time.Now(), queried: true, embedded: w.deviceKeys("signed"),
		data: SenderData{
			Sender: w.alice.userID, SenderKey: w.device.senderKey(), SigningKey: w.device.signingKey(), State: StateDeviceInfo,
			DeviceKeys: w.deviceKeys("unsigned"), RetryCount: 4, NextRetry: time.Now(), Reason: "old",
		},
	}
	got, err := d.derive(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got.DeviceKeys != nil || got.RetryCount != 0 || !got.NextRetry.IsZero() || got.Reason != "" {
		t.Errorf("step J leaves %+v", got)
	}
}
