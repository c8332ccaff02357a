package cryptohook

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// fetch asks for users' keys, and gives what that ended with.
func (w *trustWorld) fetch(users ...id.UserID) (answered []id.UserID, err error) {
	w.t.Helper()
	found, err := w.hook.fetchKeys(w.ctx, users)
	return slices.Sorted(maps.Keys(found)), err
}

func (w *trustWorld) mustFetch(users ...id.UserID) {
	w.t.Helper()
	if _, err := w.fetch(users...); err != nil {
		w.t.Fatal(err)
	}
}

// mautrixDevices gives the devices that mautrix would encrypt to, in order, with what it knows of each.
func (w *trustWorld) mautrixDevices(userID id.UserID) (devices []string) {
	w.t.Helper()
	for _, d := range must(w.hook.mach.CryptoStore.GetDevices(w.ctx, userID)) {
		devices = append(devices, fmt.Sprintf("%q %q %s %s %s", d.DeviceID, d.Name, d.IdentityKey, d.SigningKey, d.Trust))
	}
	slices.Sort(devices)
	return devices
}

// mautrixTrust gives all that mautrix knows of a user's identity, and of who has signed what, as far as it ever asks.
func (w *trustWorld) mautrixTrust(userID id.UserID) (knows []string) {
	w.t.Helper()
	store := w.hook.mach.CryptoStore
	keys := must(store.GetCrossSigningKeys(w.ctx, userID))
	signed := func(what string, key id.Ed25519, signer id.UserID, by id.Ed25519) {
		if must(store.IsKeySignedBy(w.ctx, userID, key, signer, by)) {
			knows = append(knows, what+" "+key.String()+" is signed by "+by.String())
		}
	}
	for usage, key := range keys {
		knows = append(knows, fmt.Sprintf("%s %s, at first %s", usage, key.Key, key.First))
	}
	signed("self-signing key", keys[id.XSUsageSelfSigning].Key, userID, keys[id.XSUsageMaster].Key)
	signed("master key", keys[id.XSUsageMaster].Key, w.client.UserID, w.hook.anchor().userSigningKey)
	for _, device := range must(store.GetDevices(w.ctx, userID)) {
		signed("device", device.SigningKey, userID, keys[id.XSUsageSelfSigning].Key)
		knows = append(knows, fmt.Sprintf("device %s: %s", device.SigningKey, must(w.hook.mach.ResolveTrustContext(w.ctx, device))))
	}
	slices.Sort(knows)
	return knows
}

// Whatever a server publishes, mautrix knows what it would know by its own FetchKeys.
func TestMautrixKnowsWhatItWouldHaveFetched(t *testing.T) {
	for seed := range uint64(2) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			ours, its := newTrustWorld(t), newTrustWorld(t)
			its.hook.mach.CrossSigningKeys = ours.hook.mach.CrossSigningKeys
			s := newStrangeServer(seed, ours.bot)
			s.selfSigningIsSigned = true
			if onPostgres {
				s.actors = s.actors[:4] // of users, or devices, that are one to it the last one counts, and an answer has no order
				for _, a := range s.actors {
					s.spare[a.userID] = s.spare[a.userID][:3]
				}
			}
			ours.hook.transport.base, its.hook.transport.base = s.server, s.server
			s.server.requests = make(map[string]int)
			var users []id.UserID
			for _, a := range s.actors {
				users = append(users, a.userID)
			}
			var signed, changed int
			for round := range 30 {
				s.server.forge = nil
				asked, said := s.answer()
				s.server.forge = func(answer object) {
					clear(answer)
					maps.Copy(answer, said)
				}
				var some []id.UserID
				for _, userID := range users {
					if len(asked.DeviceKeys[userID]) == 0 {
						some = append(some, userID)
					}
				}
				ours.mustFetch(some...)
				// mautrix keeps the old signing key of a device that has gone and comes again with another one.
				if _, err := its.db.Exec(its.ctx, "DELETE FROM crypto_device WHERE deleted=true"); err != nil {
					t.Fatal(err)
				}
				if _, err := its.hook.mach.FetchKeys(its.ctx, some, true); err != nil {
					t.Fatal(err)
				}
				for _, userID := range some {
					if got, want := ours.mautrixDevices(userID), its.mautrixDevices(userID); !slices.Equal(got, want) {
						t.Fatalf("round %d, %q has\n%s\nand by mautrix itself\n%s", round, userID, strings.Join(got, "\n"), strings.Join(want, "\n"))
					}
					got, want := ours.mautrixTrust(userID), its.mautrixTrust(userID)
					if !slices.Equal(got, want) {
						t.Fatalf("round %d, of %q mautrix knows\n%s\nand by itself\n%s", round, userID, strings.Join(got, "\n"), strings.Join(want, "\n"))
					}
					signed += strings.Count(strings.Join(got, "\n"), "is signed by")
					changed += strings.Count(strings.Join(ours.mautrixDevices(userID), "\n"), id.TrustStateDeviceKeyMismatch.String())
				}
			}
			if signed < 100 || changed == 0 {
				t.Errorf("only %d signatures were compared, and %d devices with other keys", signed, changed)
			}
		})
	}
}

// What mautrix does with a device that the server publishes with a fault: a known one stays as it was where the fault may be anybody's.
func TestDevicesWithFaultsForMautrix(t *testing.T) {
	other := newActor("@alice:test").addDevice("ALICE")
	for name, tc := range map[string]struct {
		forge         func(keys object)
		stays, enters bool
	}{
		"as it was":           {func(object) {}, true, true},
		"a forged signature":  {func(keys object) { putSignature(keys, "@alice:test", "ALICE", forgedSignature()) }, true, false},
		"another device's ID": {func(keys object) { keys["device_id"] = "OTHER" }, false, false},
		"another user's ID":   {func(keys object) { keys["user_id"] = "@eve:test" }, false, false},
		"no identity key":     {func(keys object) { delete(keys["keys"].(object), "curve25519:ALICE") }, false, false},
		"another device's keys": {func(keys object) {
			clear(keys)
			maps.Copy(keys, other.keys())
		}, true, true},
	} {
		for _, known := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, known %t", name, known), func(t *testing.T) {
				w := newTrustWorld(t)
				alice := w.server.add(newActor("@alice:test")).addDevice("ALICE")
				if known {
					w.mustFetch("@alice:test")
				}
				w.server.forge = func(answer object) {
					tc.forge(answer["device_keys"].(object)["@alice:test"].(object)["ALICE"].(object))
				}
				w.mustFetch("@alice:test")
				devices := must(w.hook.mach.CryptoStore.GetDevices(w.ctx, "@alice:test"))
				want := tc.enters
				if known {
					want = tc.stays
				}
				if (devices["ALICE"] != nil) != want {
					t.Fatalf("stored are %v", devices)
				}
				if known && want && devices["ALICE"].SigningKey != alice.signingKey() {
					t.Error("the device has another key")
				}
			})
		}
	}
}

func TestDeviceThatComesAgainHasItsNewKeyForMautrix(t *testing.T) {
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test"))
	for range 2 {
		alice.devices = nil
		w.mustFetch("@alice:test")
		device := alice.addDevice("ALICE")
		w.mustFetch("@alice:test")
		if known := must(w.hook.mach.CryptoStore.GetDevice(w.ctx, "@alice:test", "ALICE")); known.SigningKey != device.signingKey() {
			t.Errorf("the signing key is %s, not %s", known.SigningKey, device.signingKey())
		}
	}
}

// What somebody has had mautrix note of a device stays.
func TestTrustThatMautrixKeepsOfADeviceStays(t *testing.T) {
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test"))
	genuine := alice.addDevice("ALICE")
	w.mustFetch(alice.userID)
	trust := func() id.TrustState {
		t.Helper()
		return must(w.hook.mach.CryptoStore.GetDevice(w.ctx, alice.userID, "ALICE")).Trust
	}
	device := must(w.hook.mach.CryptoStore.GetDevice(w.ctx, alice.userID, "ALICE"))
	device.Trust = id.TrustStateBlacklisted
	if err := w.hook.mach.CryptoStore.PutDevice(w.ctx, alice.userID, device); err != nil {
		t.Fatal(err)
	}
	if w.mustFetch(alice.userID); trust() != id.TrustStateBlacklisted {
		t.Errorf("a device that was not to be trusted is %s", trust())
	}
	alice.devices = nil
	alice.addDevice("ALICE")
	if w.mustFetch(alice.userID); trust() != id.TrustStateDeviceKeyMismatch {
		t.Errorf("with another device's keys it is %s", trust())
	}
	alice.devices = []*actorDevice{genuine}
	if w.mustFetch(alice.userID); trust() != id.TrustStateUnset {
		t.Errorf("with its own keys again it is %s", trust())
	}
}

// A self-signing key that was replaced has signed nothing, and when it comes back what it signs then counts.
func TestSignaturesOfAReplacedKeyAreForgotten(t *testing.T) {
	w, alice, _ := twoPeople(t)
	owner := alice.owner
	first := owner.selfSigning
	signed := func() bool {
		t.Helper()
		return must(w.hook.mach.CryptoStore.IsKeySignedBy(w.ctx, owner.userID, alice.signingKey(), owner.userID, first.PublicKey()))
	}
	if !signed() {
		t.Fatal("the device is not signed")
	}
	owner.selfSigning = must(olm.NewPKSigning())
	if w.mustFetch(owner.userID); signed() {
		t.Error("the former key's signature is still there")
	}
	owner.selfSigning = first
	w.server.forge = func(answer object) {
		answer["device_keys"].(object)[owner.userID.String()].(object)["ALICE"] = alice.forgedKeys()
	}
	if w.mustFetch(owner.userID); signed() {
		t.Error("a forged signature counts, since there was a valid one once")
	}
	w.server.forge = nil
	if w.mustFetch(owner.userID); !signed() {
		t.Error("the signature does not count any more")
	}
}

// A room's key is not used on when a member has a device more, less, or another one: it would not reach the new one, and the old one reads on.
func TestRoomsGetNewKeysWhenDevicesChange(t *testing.T) {
	w := crowdedRoom(t, 0)
	alice := w.server.add(newActor("@alice:test"))
	first := alice.addDevice("FIRST")
	if err := w.client.StateStore.SetMembership(w.ctx, trustRoom, alice.userID, event.MembershipJoin); err != nil {
		t.Fatal(err)
	}
	session := func() string {
		t.Helper()
		if outbound := must(w.hook.uow.GetOutboundGroupSession(w.ctx, trustRoom)); outbound != nil {
			return outbound.ID().String()
		}
		return ""
	}
	w.mustFetch(alice.userID)
	for _, change := range []struct {
		what  string
		make  func()
		renew bool
	}{
		{"nothing", func() {}, false},
		{"a device more", func() { alice.addDevice("SECOND") }, true},
		{"nothing", func() {}, false},
		{"one in another's place", func() { alice.devices = []*actorDevice{first}; alice.addDevice("THIRD") }, true},
		{"a device less", func() { alice.devices = []*actorDevice{first} }, true},
	} {
		w.speak()
		before := session()
		change.make()
		w.mustFetch(alice.userID)
		if after := session(); after != before && after != "" || (after == "") != change.renew {
			t.Errorf("%s: session %s, then %q", change.what, before, after)
		}
	}
}

func TestRoomsKeepTheirKeysIfThatIsWanted(t *testing.T) {
	w := crowdedRoom(t, 1)
	w.speak()
	w.hook.mach.DisableDeviceChangeKeyRotation = true
	w.server.add(newActor("@member0:test")).addDevice("NEW")
	w.mustFetch("@member0:test")
	if must(w.hook.uow.GetOutboundGroupSession(w.ctx, trustRoom)) == nil {
		t.Error("there is no session any more")
	}
}

// To mautrix a user whose list was never asked for has no devices, whichever it has seen: the room's key has reached none.
func TestDevicesOfAnUntrackedUserAreNewOnes(t *testing.T) {
	w := crowdedRoom(t, 1)
	w.speak()
	device := w.server.add(newActor("@member0:test")).addDevice("SEEN")
	if _, err := w.db.Exec(w.ctx, "DELETE FROM crypto_tracked_user WHERE user_id='@member0:test'"); err != nil {
		t.Fatal(err)
	}
	err := w.hook.mach.CryptoStore.PutDevice(w.ctx, "@member0:test", &id.Device{
		UserID: "@member0:test", DeviceID: "SEEN", IdentityKey: device.senderKey(), SigningKey: device.signingKey(),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.mustFetch("@member0:test")
	if must(w.hook.uow.GetOutboundGroupSession(w.ctx, trustRoom)) != nil {
		t.Error("the session is used on")
	}
}

// What an answer says of devices, and what follows for the keys of rooms, are stored together or not at all.
func TestAnswerIsStoredWholeOrNotAtAll(t *testing.T) {
	for table, event := range map[string]string{"crypto_megolm_outbound_session": "DELETE", "crypto_cross_signing_signatures": "INSERT", "crypto_device": "INSERT"} {
		t.Run(table, func(t *testing.T) {
			sqliteOnly(t)
			w := newTrustWorld(t)
			alice := w.server.add(newActor("@alice:test"))
			alice.addDevice("FIRST")
			if err := w.client.StateStore.SetMembership(w.ctx, trustRoom, alice.userID, "join"); err != nil {
				t.Fatal(err)
			}
			w.mustFetch(alice.userID)
			w.speak()
			alice.addDevice("SECOND")
			before := append(w.learnt(), w.mautrixDevices(alice.userID)...)
			exec := func(query string) {
				t.Helper()
				if _, err := w.db.Exec(w.ctx, query); err != nil {
					t.Fatal(err)
				}
			}
			exec("CREATE TRIGGER forbidden BEFORE " + event + " ON " + table + " BEGIN SELECT RAISE(ABORT, 'forbidden'); END")
			if answered, err := w.fetch(alice.userID); err == nil || len(answered) > 0 {
				t.Errorf("answered about %v, %v", answered, err)
			}
			if after := append(w.learnt(), w.mautrixDevices(alice.userID)...); !slices.Equal(after, before) {
				t.Errorf("stored are\n%s\nand were\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
			}
			exec("DROP TRIGGER forbidden")
			w.mustFetch(alice.userID)
			if devices := w.mautrixDevices(alice.userID); len(devices) != 2 {
				t.Errorf("afterwards stored are %v", devices)
			}
		})
	}
}

// With the secret keys of our identity there is nothing that mautrix would have to forget. What it asks of our own devices is there.
func TestOwnDevicesAreKnownToMautrix(t *testing.T) {
	w := newTrustWorld(t)
	other := w.server.add(w.bot).addDevice("OTHER")
	if answered, err := w.fetch(w.bot.userID); err != nil || len(answered) != 1 {
		t.Fatalf("answered about %v, %v", answered, err)
	}
	store := w.hook.mach.CryptoStore
	if device := must(store.GetDevice(w.ctx, w.bot.userID, "OTHER")); device.SigningKey != other.signingKey() {
		t.Errorf("our other device is %v", device)
	}
	if signatures := must(store.GetSignaturesForKeyBy(w.ctx, w.bot.userID, other.signingKey(), w.bot.userID)); signatures[w.bot.selfSigningKey()] == "" {
		t.Errorf("the signatures on it are %v", signatures)
	}
}

// Public keys of an identity that we do not have the secret keys of mautrix remembers, and has to hear of new ones.
func TestOwnKeysAreFetchedByMautrix(t *testing.T) {
	w, alice, _ := twoPeople(t)
	w.hook.mach.CrossSigningKeys = nil // it would know them by these, without asking
	w.mustFetch(w.bot.userID)
	if key := must(w.hook.mach.GetOwnCrossSigningPublicKeys(w.ctx)).MasterKey; key != w.bot.masterKey() {
		t.Fatalf("mautrix takes %s for our master key", key)
	}
	w.bot.reset()
	answered, err := w.fetch(alice.owner.userID, w.bot.userID)
	if err != nil || len(answered) != 2 {
		t.Fatalf("answered about %v, %v", answered, err)
	}
	if key := must(w.hook.mach.GetOwnCrossSigningPublicKeys(w.ctx)).MasterKey; key != w.bot.masterKey() {
		t.Errorf("mautrix takes %s for our master key, the server has %s", key, w.bot.masterKey())
	}
}

// Whoever has mautrix forget the sessions of devices that are gone is not kept from it.
func TestSessionsOfDeletedDevicesAreForgottenIfWanted(t *testing.T) {
	w, alice, _ := twoPeople(t)
	w.hook.mach.DeleteKeysOnDeviceDelete = true
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	alice.owner.devices = nil
	w.mustFetch(alice.owner.userID)
	if stored := w.storedKey(s, trustRoom); stored != nil {
		t.Error("the session is still there")
	}
}

func TestOlderAnswerTakesNothingOfMautrixBack(t *testing.T) {
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test"))
	alice.addDevice("FIRST")
	asked := &mautrix.ReqQueryKeys{DeviceKeys: mautrix.DeviceKeysRequest{alice.userID: {}}}
	older := rawJSON(w.server.query(asked))
	alice.addDevice("SECOND")
	newer := rawJSON(w.server.query(asked))
	observe := func(number uint64, body []byte) {
		t.Helper()
		var took taken
		req := must(http.NewRequestWithContext(context.WithValue(w.ctx, takingKey{}, &took), http.MethodPost, "http://test/keys/query", strings.NewReader(string(rawJSON(asked)))))
		if _, err := w.hook.observeKeyQuery(req, number, body); err != nil {
			t.Fatal(err)
		}
		if !took.read || len(took.answered) != 1 {
			t.Errorf("%+v", took)
		}
	}
	first, second := w.hook.questions.begin(), w.hook.questions.begin()
	observe(second, newer)
	observe(first, older)
	if devices := w.mautrixDevices(alice.userID); len(devices) != 2 {
		t.Errorf("stored are %v", devices)
	}
}

// Somebody who has put another transport into the client has taken the hook's away.
func TestQueryThatTheHookDoesNotSeeFails(t *testing.T) {
	w := newTrustWorld(t)
	w.server.add(newActor("@alice:test")).addDevice("ALICE")
	w.client.Client.Transport = w.server
	if answered, err := w.fetch("@alice:test"); err == nil || len(answered) > 0 {
		t.Errorf("answered about %v, %v", answered, err)
	}
}

func TestAnswerIsStoredForMautrixInFewStatements(t *testing.T) {
	const users, devices = 157, 2
	w := newTrustWorld(t)
	var all []id.UserID
	for i := range users {
		a := w.server.add(newActor(id.NewUserID(fmt.Sprint("user", i), "test")))
		for n := range devices {
			a.addDevice(id.DeviceID(fmt.Sprint("DEVICE", n)))
		}
		all = append(all, a.userID)
	}
	for _, round := range []string{"first", "again"} {
		count := w.statements("crypto_")
		w.mustFetch(all...)
		if got := count.count.Load(); got > 60 {
			t.Errorf("%s: %d statements about %d users with %d devices each", round, got, users, devices)
		}
	}
	if known := w.countIn("crypto_device"); known != users*devices {
		t.Errorf("there are %d devices", known)
	}
}

// A member whose homeserver is silent is asked for once, and gets the room's key when it speaks again.
func TestMemberWithoutAnAnswerHoldsUpNoMessage(t *testing.T) {
	w := crowdedRoom(t, 2)
	silent := newActor("@silent:elsewhere")
	silent.addDevice("SILENT")
	if err := w.client.StateStore.SetMembership(w.ctx, trustRoom, silent.userID, event.MembershipJoin); err != nil {
		t.Fatal(err)
	}
	before := w.server.count("keys/query")
	w.speak()
	if asked := w.server.count("keys/query") - before; asked != 1 {
		t.Errorf("the homeserver was asked %d times", asked)
	}
	w.server.add(silent)
	w.mustFetch(silent.userID)
	if session := must(w.hook.uow.GetOutboundGroupSession(w.ctx, trustRoom)); session != nil {
		t.Error("the session that the member did not get is used on")
	}
}

// Without any answer nobody is taken to have no devices.
func TestNothingIsSharedWhenOurHomeserverFails(t *testing.T) {
	w := crowdedRoom(t, 2)
	w.server.down = true
	if _, err := w.hook.Encrypt(w.ctx, trustRoom, event.EventMessage, object{"msgtype": "m.text", "body": "hello"}); err == nil {
		t.Fatal("a message was encrypted")
	}
	w.server.down = false
	w.speak()
}
