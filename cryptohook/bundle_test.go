package cryptohook

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/crypto/attachment"
	"maunium.net/go/mautrix/id"
)

// bundleWorld is a room that alice invites the bot to, with a message that bob wrote before. She gives the key with the invitation.
type bundleWorld struct {
	*trustWorld
	server     *accountServer
	alice, bob *actorDevice
	session    *megolm
	said       object
	// content is that of the m.room_key_bundle.
	content object
}

const bundleRoom = id.RoomID("!history:test")

// newBundleWorld makes the file by the given changes, and sends nothing yet.
func newBundleWorld(t *testing.T, change func(w *bundleWorld, file object)) *bundleWorld {
	t.Helper()
	w := &bundleWorld{trustWorld: newTrustWorld(t), session: newMegolm(bundleRoom)}
	w.server = newAccountServer(w.trustWorld)
	w.alice, w.bob = newActor("@alice:test").addDevice("ALICE"), newActor("@bob:test").addDevice("BOB")
	w.know(w.alice.owner, w.bob.owner)
	w.said = w.say(w.bob, w.session, "before you came")
	file := object{"room_keys": []any{historicKey(t, w.session, w.bob)}, "withheld": []any{}}
	if change != nil {
		change(w, file)
	}
	w.content = w.upload("bundle", bundleRoom, rawJSON(file))
	return w
}

// historicKey is a session as bundles have it.
func historicKey(t *testing.T, s *megolm, device *actorDevice) object {
	t.Helper()
	var key object
	if err := json.Unmarshal(rawJSON(exported(t, s, device)), &key); err != nil {
		t.Fatal(err)
	}
	return key
}

// upload puts an encrypted file on the server and gives the content that names it.
func (w *bundleWorld) upload(name string, roomID id.RoomID, plaintext []byte) object {
	file := attachment.NewEncryptedFile()
	data := bytes.Clone(plaintext)
	file.EncryptInPlace(data)
	w.server.files[name] = data
	var described object
	if err := json.Unmarshal(rawJSON(file), &described); err != nil {
		w.t.Fatal(err)
	}
	described["url"] = "mxc://test/" + name
	return object{"room_id": roomID.String(), "file": described}
}

// send has alice send the bundle.
func (w *bundleWorld) send(changes ...func(payload object)) {
	w.t.Helper()
	w.sync(syncPart{toDevice: []object{w.olmEvent(w.alice, bundleType, w.content, changes...)}})
}

// invite has somebody invite the bot, and the bot join if it likes.
func (w *bundleWorld) invite(inviter id.UserID, join bool) {
	w.t.Helper()
	member := object{"type": "m.room.member", "state_key": "@bot:test", "sender": inviter.String(), "content": object{"membership": "invite"}}
	resp, since := w.response(syncPart{})
	if err := json.Unmarshal(rawJSON(object{bundleRoom.String(): object{"invite_state": object{"events": []any{member}}}}), &resp.Rooms.Invite); err != nil {
		w.t.Fatal(err)
	}
	if err := w.client.Syncer.ProcessResponse(w.ctx, resp, since); err != nil {
		w.t.Fatal(err)
	}
	if join {
		w.sync(syncPart{room: bundleRoom, state: []object{
			{"type": "m.room.encryption", "state_key": "", "event_id": "$e", "sender": "@alice:test", "content": object{"algorithm": string(id.AlgorithmMegolmV1)}},
			{"type": "m.room.member", "state_key": "@bot:test", "event_id": "$j", "sender": "@bot:test", "content": object{"membership": "join"}},
		}})
	}
}

func (w *bundleWorld) fetch() {
	w.t.Helper()
	for range 3 {
		if err := w.hook.bundles.pass(w.ctx); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *bundleWorld) kept() int { return len(must(w.hook.store.bundles(w.ctx, time.UnixMilli(0)))) }

func (w *bundleWorld) wantImported(want bool) {
	w.t.Helper()
	if has := w.storedKey(w.session, bundleRoom) != nil; has != want {
		w.t.Errorf("the key is there: %v", has)
	}
}

func TestHistoryFromTheInviterIsImported(t *testing.T) {
	for name, order := range map[string]func(w *bundleWorld){
		"the bundle first, as apps send it": func(w *bundleWorld) { w.send(); w.invite("@alice:test", true) },
		"the invitation first":              func(w *bundleWorld) { w.invite("@alice:test", true); w.send() },
		"a restart between":                 func(w *bundleWorld) { w.send(); w.restart(); w.invite("@alice:test", true); w.restart() },
		"under the unstable type": func(w *bundleWorld) {
			w.sync(syncPart{toDevice: []object{w.olmEvent(w.alice, unstableBundleType, w.content)}})
			w.invite("@alice:test", true)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newBundleWorld(t, nil)
			order(w)
			w.sync(syncPart{room: bundleRoom, timeline: []object{w.said}})
			w.handle()
			w.fetch()
			if sessions, _ := w.changes.take(); !sessions[w.session.id()] {
				t.Error("nobody was told of the key")
			}
			w.handle()
			seen := w.sawOne(id.EventID(w.said["event_id"].(string)))
			wantCode(t, seen, CodeAuthenticityNotGuaranteed)
			if v := seen.verdict; seen.body != "before you came" || v.Source != SourceHistoryBundle || !v.Legacy || v.SourceUser != "@alice:test" {
				t.Errorf("read %q: %+v", seen.body, v)
			}
			stored := w.storedKey(w.session, bundleRoom)
			if stored.SourceUser != "@alice:test" || stored.SharedHistory == nil || !*stored.SharedHistory || stored.KeySource != keySourceBundle {
				t.Errorf("stored %+v", stored)
			}
			if w.kept() != 0 || w.server.downloads != 1 {
				t.Errorf("%d bundles are kept, %d downloads", w.kept(), w.server.downloads)
			}
			// mautrix forgets nothing of it either.
			w.restart()
			if again := w.judgeIn(bundleRoom, w.say(w.bob, w.session, "again")); again.verdict.Source != SourceHistoryBundle || again.verdict.SourceUser != "@alice:test" {
				t.Errorf("after a restart: %+v", again.verdict)
			}
		})
	}
}

func (w *trustWorld) judgeIn(roomID id.RoomID, evt object) seenEvent {
	w.t.Helper()
	w.sync(syncPart{room: roomID, timeline: []object{evt}})
	w.handle()
	return w.sawOne(id.EventID(evt["event_id"].(string)))
}

func TestHistoryIsFetchedForTheInviterOnly(t *testing.T) {
	for name, arrange := range map[string]func(w *bundleWorld){
		"nobody has invited us": func(w *bundleWorld) { w.send() },
		"somebody else has":     func(w *bundleWorld) { w.send(); w.invite("@bob:test", true) },
		"we have not joined":    func(w *bundleWorld) { w.send(); w.invite("@alice:test", false) },
		"it was a day ago": func(w *bundleWorld) {
			w.invite("@alice:test", true)
			w.clock.advance(keepBundles + time.Second)
			w.send()
		},
		"the bundle is a day old": func(w *bundleWorld) {
			w.send()
			w.clock.advance(keepBundles + time.Second)
			w.invite("@alice:test", true)
		},
		"it is for another room": func(w *bundleWorld) {
			w.content["room_id"] = trustRoom.String()
			w.send()
			w.invite("@alice:test", true)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newBundleWorld(t, nil)
			arrange(w)
			w.fetch()
			w.wantImported(false)
			if w.server.downloads != 0 {
				t.Error("the file was fetched")
			}
		})
	}
}

// secondDevice has alice write from a device that her identity does not vouch for.
func secondDevice(w *bundleWorld) {
	w.alice = w.alice.owner.addDevice("SECOND")
	w.alice.crossSigned = false
	w.know(w.alice.owner)
}

func TestHistoryFromAnUnprovenSenderIsIgnored(t *testing.T) {
	for name, tc := range map[string]struct {
		before func(w *bundleWorld)
		change func(w *bundleWorld) func(payload object)
		kept   int
	}{
		"without device keys in the message": {nil, func(*bundleWorld) func(object) { return withoutDeviceKeys }, 0},
		"from a device that is not signed":   {secondDevice, nil, 1},
		"with a forged signature":            {secondDevice, func(w *bundleWorld) func(object) { return embedding(w.alice.forgedKeys()) }, 0},
		"from a user who was verified and reset": {func(w *bundleWorld) {
			w.alice.owner.verifiedBy = w.bot
			w.know(w.alice.owner)
			w.alice.owner.reset()
			w.know(w.alice.owner)
		}, nil, 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := newBundleWorld(t, nil)
			if tc.before != nil {
				tc.before(w)
			}
			change := func(object) {}
			if tc.change != nil {
				change = tc.change(w)
			}
			w.send(change)
			w.invite("@alice:test", true)
			w.fetch()
			w.wantImported(false)
			if w.server.downloads != 0 || w.kept() != tc.kept {
				t.Errorf("%d downloads, %d bundles are kept", w.server.downloads, w.kept())
			}
		})
	}
}

// The sender's keys are known later than the bundle: it waits, and the key query about its sender fetches it.
func TestHistoryWaitsForItsSendersKeys(t *testing.T) {
	w := newBundleWorld(t, nil)
	carol := newActor("@carol:test")
	w.alice = carol.addDevice("CAROL")
	w.server.w.server.down = true
	w.send()
	w.invite("@carol:test", true)
	w.fetch()
	w.wantImported(false)
	w.restart()
	w.server.w.server.down = false
	w.server.w.server.add(carol)
	w.fetch()
	w.clock.advance(time.Hour)
	w.resolve()
	w.fetch()
	w.wantImported(true)
}

func TestBundlesThatAreNotValidHarmNothing(t *testing.T) {
	for name, change := range map[string]func(w *bundleWorld, file object){
		"of another room": func(w *bundleWorld, file object) {
			key := historicKey(w.t, w.session, w.bob)
			key["room_id"] = "!other:test"
			file["room_keys"] = []any{key}
		},
		"not to be shared": func(w *bundleWorld, file object) {
			key := historicKey(w.t, w.session, w.bob)
			key["shared_history"] = false
			file["room_keys"] = []any{key}
		},
		"another session's key": func(w *bundleWorld, file object) {
			key := historicKey(w.t, w.session, w.bob)
			key["session_key"] = string(exportOf(w.t, newMegolm(bundleRoom).key, 0))
			file["room_keys"] = []any{key}
		},
		"no claimed keys": func(w *bundleWorld, file object) {
			key := historicKey(w.t, w.session, w.bob)
			delete(key, "sender_claimed_keys")
			file["room_keys"] = []any{key}
		},
		"null":    func(_ *bundleWorld, file object) { file["room_keys"] = []any{nil} },
		"no list": func(_ *bundleWorld, file object) { file["room_keys"] = object{"a": 1} },
		"nothing": func(_ *bundleWorld, file object) { delete(file, "room_keys") },
		"only what is kept": func(w *bundleWorld, file object) {
			file["room_keys"] = []any{}
			file["withheld"] = []any{object{"algorithm": string(id.AlgorithmMegolmV1), "code": "m.unauthorised", "room_id": bundleRoom.String(),
				"session_id": w.session.id().String(), "sender_key": w.bob.senderKey().String(), "reason": "bob does not like you"}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newBundleWorld(t, change)
			w.send()
			w.invite("@alice:test", true)
			w.fetch()
			w.wantImported(false)
			if claims := w.claims(w.session); len(claims) != 0 || w.kept() != 0 {
				t.Errorf("%d claims, %d bundles are kept", len(claims), w.kept())
			}
			// What the inviter withholds is not what bob withholds: his key is waited for.
			w.sync(syncPart{room: bundleRoom, timeline: []object{w.said}})
			w.handle()
			w.clock.advance(defaultKeyWait)
			w.handle()
			if seen := w.sawOne(id.EventID(w.said["event_id"].(string))); seen.verdict.Reason != ReasonUnknownSession {
				t.Errorf("the reason is %s", seen.verdict.Reason)
			}
		})
	}
}

func TestBundlesThatCannotBeFetchedHarmNothing(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(w *bundleWorld)
		kept   int
	}{
		"the file is gone":             {func(w *bundleWorld) { delete(w.server.files, "bundle") }, 0},
		"the server fails":             {func(w *bundleWorld) { w.server.status = http.StatusBadGateway }, 1},
		"the file was changed":         {func(w *bundleWorld) { w.server.files["bundle"][3] ^= 1 }, 0},
		"the file is cut off":          {func(w *bundleWorld) { w.server.files["bundle"] = w.server.files["bundle"][:20] }, 0},
		"the file is too big":          {func(w *bundleWorld) { w.server.files["bundle"] = make([]byte, maxBundle+1) }, 0},
		"the file is no JSON":          {func(w *bundleWorld) { w.content = w.upload("junk", bundleRoom, []byte("junk")) }, 0},
		"the file nests too deep":      {func(w *bundleWorld) { w.content = w.upload("deep", bundleRoom, bytes.Repeat([]byte("["), 1<<20)) }, 0},
		"the event has no room":        {func(w *bundleWorld) { delete(w.content, "room_id") }, 0},
		"the event has no file":        {func(w *bundleWorld) { delete(w.content, "file") }, 0},
		"the address is no address":    {func(w *bundleWorld) { w.content["file"].(object)["url"] = "https://evil.test/" }, 0},
		"the address leads elsewhere":  {func(w *bundleWorld) { w.content["file"].(object)["url"] = "mxc://test/../../v3/logout" }, 0},
		"the key is no key":            {func(w *bundleWorld) { w.content["file"].(object)["key"] = object{"k": "x"} }, 0},
		"the event is not of its form": {func(w *bundleWorld) { w.content["file"] = []any{} }, 0},
		"the event is too big":         {func(w *bundleWorld) { w.content["padding"] = strings.Repeat("x", maxBundleEvent) }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			w := newBundleWorld(t, nil)
			tc.change(w)
			w.send()
			w.invite("@alice:test", true)
			w.fetch()
			w.wantImported(false)
			if w.kept() != tc.kept {
				t.Errorf("%d bundles are kept", w.kept())
			}
			if tc.kept == 0 && strings.Count(w.log.String(), "Ignoring a room key bundle") != 1 {
				t.Error("it was not logged once")
			}
		})
	}
}

func TestFailingDownloadIsTriedAgainByBackOff(t *testing.T) {
	w := newBundleWorld(t, nil)
	w.server.status = http.StatusBadGateway
	w.send()
	w.invite("@alice:test", true)
	w.fetch()
	if w.server.downloads != 1 {
		t.Errorf("%d downloads at once", w.server.downloads)
	}
	w.server.status = 0
	w.clock.advance(firstBackoff)
	w.fetch()
	w.wantImported(true)
}

func TestBundlesAreBounded(t *testing.T) {
	w := newBundleWorld(t, nil)
	var events []object
	for i := range 3 * bundlesPerSender {
		w.content["room_id"] = fmt.Sprintf("!%d:test", i)
		events = append(events, w.olmEvent(w.alice, bundleType, w.content))
	}
	w.sync(syncPart{toDevice: events})
	if w.kept() != bundlesPerSender {
		t.Errorf("%d bundles of one sender are kept", w.kept())
	}
	w.clock.advance(keepBundles + time.Second)
	w.content["room_id"] = bundleRoom.String()
	w.send()
	if w.kept() != 1 {
		t.Errorf("%d bundles are kept after a day", w.kept())
	}
	w.content = w.upload("newer", bundleRoom, []byte("{}"))
	w.send()
	if w.kept() != 1 {
		t.Error("a newer bundle does not take the place of the older one")
	}
}
