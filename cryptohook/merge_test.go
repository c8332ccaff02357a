package cryptohook

import (
	"os"
	"testing"
	"time"

	"gopkg.in/yaml.v3"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/id"
)

// mergeRow is one meeting of testdata/merge.yaml, which explains the words.
type mergeRow struct {
	Name    string   `yaml:"name"`
	Stored  mergeKey `yaml:"stored"`
	Arrived mergeKey `yaml:"arrived"`
	Then    string   `yaml:"then"`
	Want    struct {
		From   uint32 `yaml:"from"`
		Source Source `yaml:"source"`
		State  State  `yaml:"state"`
		Legacy bool   `yaml:"legacy"`
		Newer  bool   `yaml:"newer"`
		Claims int    `yaml:"claims"`
		Code   Code   `yaml:"code"`
	} `yaml:"want"`
}

type mergeKey struct {
	By    Source `yaml:"by"`
	Proof string `yaml:"proof"`
	From  uint32 `yaml:"from"`
	As    string `yaml:"as"`
}

// mautrixSource is what mautrix calls each way.
var mautrixSource = map[Source]id.KeySource{
	SourceForwarded: id.KeySourceForward, SourceBackup: id.KeySourceBackup, SourceImport: id.KeySourceImport, SourceHistoryBundle: keySourceBundle,
}

// mergeWorld is a room with the session that two keys are of.
type mergeWorld struct {
	*trustWorld
	alice, mallory *actorDevice
	session, other *megolm
	keys           [2]string
}

func newMergeWorld(t *testing.T) *mergeWorld {
	w := &mergeWorld{trustWorld: newTrustWorld(t), session: newMegolm(trustRoom), other: newMegolm(trustRoom)}
	w.alice, w.mallory = newActor("@alice:test").addDevice("ALICE"), newActor("@mallory:test").addDevice("MALLORY")
	w.alice.unpublished = true
	w.know(w.alice.owner, w.mallory.owner)
	w.keys[0] = w.session.key
	w.session.message("the first")
	w.keys[1] = w.session.outbound.Key()
	return w
}

// deliver lets a key come.
func (w *mergeWorld) deliver(key mergeKey) {
	w.t.Helper()
	if key.By == "" {
		return
	}
	w.clock.advance(time.Second)
	device, roomID := w.alice, trustRoom
	if key.As == "other_device" || key.As == "other_ratchet_and_device" {
		device = w.mallory
	}
	if key.As == "other_room" {
		roomID = "!other:test"
	}
	if key.By == SourceDirect {
		content := w.session.forRoom(roomID)
		content["session_key"] = w.keys[key.From]
		change := map[string]func(object){
			"none": withoutDeviceKeys, "info": embedding(device.selfSignedKeys()), "signed": embedding(device.keys()),
		}[key.Proof]
		w.sync(syncPart{toDevice: []object{w.olmEvent(device, "m.room_key", content, change)}})
		return
	}
	exported := &crypto.ExportedSession{
		Algorithm: id.AlgorithmMegolmV1, RoomID: roomID, SessionID: w.session.id(), SenderKey: device.senderKey(),
		SenderClaimedKeys: crypto.SenderClaimedKeys{Ed25519: device.signingKey()},
		SessionKey:        string(exportOf(w.t, w.session.key, key.From)),
	}
	switch key.As {
	case "other_key":
		exported.SenderClaimedKeys.Ed25519 = w.mallory.signingKey()
	case "other_ratchet", "other_ratchet_and_device":
		exported.SessionKey = string(grafted(w.t, w.session, w.other))
	}
	session := must(parseExport(exported, mautrixSource[key.By], ""))
	if err := w.hook.importSession(w.ctx, session, new(ImportResult)); err != nil && !isExportFault(err) {
		w.t.Fatal(err)
	}
}

func TestEveryMeetingOfTwoKeys(t *testing.T) {
	var rows []mergeRow
	if err := yaml.Unmarshal(must(os.ReadFile("testdata/merge.yaml")), &rows); err != nil {
		t.Fatal(err)
	}
	for _, row := range rows {
		t.Run(row.Name, func(t *testing.T) { newMergeWorld(t).play(row) })
	}
}

func (w *mergeWorld) play(row mergeRow) {
	t, want := w.t, row.Want
	w.deliver(row.Stored)
	w.deliver(row.Arrived)
	newer := w.row(w.session, w.alice).UpdatedAt.Equal(w.clock.Now()) && row.Arrived.By != ""
	if row.Then == "published" {
		w.alice.unpublished = false
		w.know(w.alice.owner)
	}
	w.resolve()
	stored := w.storedKey(w.session, trustRoom)
	if stored == nil {
		t.Fatal("the key is gone")
	}
	if first := stored.Internal.FirstKnownIndex(); first != want.From || stored.SenderKey != w.alice.senderKey() {
		t.Errorf("the stored ratchet begins at %d and is of %s", first, stored.SenderKey)
	}
	// The ratchet of a session that two devices claim may have come from either.
	if sourceOf(stored.KeySource) != want.Source && want.Claims < 2 {
		t.Errorf("mautrix calls the stored session %s", stored.KeySource)
	}
	claim := w.row(w.session, w.alice)
	if claim.Source != want.Source || claim.State != want.State || claim.Legacy != want.Legacy || claim.Reason != "" {
		t.Errorf("the claim is %+v", claim)
	}
	if newer != want.Newer {
		t.Errorf("the newer claim was taken: %v", newer)
	}
	if claims := len(w.claims(w.session)); claims != max(want.Claims, 1) {
		t.Errorf("%d claims are kept", claims)
	}
	for range 2 {
		seen := w.judgeNow(w.say(w.alice, w.session, "hello"))
		wantCode(t, seen, want.Code)
		if seen.body != "hello" {
			t.Errorf("read %q (%s)", seen.body, seen.verdict.Reason)
		}
		w.restart()
	}
}

// At equal trust the copy of the device keys that names the more signers stays, whichever is newer: the other may be the last that
// anybody sees of the device.
func TestSignatureOnDeviceKeysIsNotLostInAMerge(t *testing.T) {
	for _, signedFirst := range []bool{true, false} {
		w := newTrustWorld(t)
		alice := newActor("@alice:test").addDevice("ALICE")
		alice.unpublished = true
		w.server.add(alice.owner).hidden = true
		s := newMegolm(trustRoom)
		copies := []object{alice.keys(), alice.selfSignedKeys()}
		if !signedFirst {
			copies[0], copies[1] = copies[1], copies[0]
		}
		for _, keys := range copies {
			w.sync(syncPart{toDevice: []object{w.share(alice, s, embedding(keys))}})
			w.resolve()
			w.wantState(s, alice, StateDeviceInfo)
		}
		alice.owner.hidden = false
		w.know(alice.owner)
		w.wantState(s, alice, StateSenderUnverified)
	}
}
