package cryptohook

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

// What is published is checked before it is stored. If our own keys have become others in between, it is judged by those of the end.
func TestPublishedIdentityIsJudgedByOurKeysOfTheMomentItIsStored(t *testing.T) {
	w, alice, _ := twoPeople(t)
	master := alice.owner.masterObject()
	signInto(master, w.bot.userID, w.bot.userSigning.PublicKey().String(), w.bot.userSigning)
	answer := &keyQuery{
		MasterKeys:      map[id.UserID]json.RawMessage{alice.owner.userID: rawJSON(master)},
		SelfSigningKeys: map[id.UserID]json.RawMessage{alice.owner.userID: rawJSON(alice.owner.selfSigningObject())},
	}
	former := w.hook.anchor()
	former.userSigningKey = newActor("@bot:test").userSigning.PublicKey()
	user := &publishedUser{userID: alice.owner.userID}
	user.checkIdentity(former, answer)
	if user.identity.verifiedBy != "" {
		t.Fatalf("by the former key verified by %s", user.identity.verifiedBy)
	}
	if err := w.hook.learn(t.Context(), func(ctx context.Context) error { return w.hook.storePublished(ctx, []*publishedUser{user}, answer) }); err != nil {
		t.Fatal(err)
	}
	if stored := must(w.hook.store.identity(t.Context(), alice.owner.userID)); stored.VerifiedBy != w.bot.userSigning.PublicKey() {
		t.Errorf("stored is %+v", stored)
	}
}

// A device whose keys are not valid is not stored, and keeps no other from being stored.
func TestDevicesWithAFaultAreLeftOut(t *testing.T) {
	w, alice, _ := twoPeople(t)
	userID := alice.owner.userID
	broken, other := alice.owner.addDevice("BROKEN").keys(), alice.owner.addDevice("OTHER").keys()
	putSignature(broken, userID, "BROKEN", strings.Repeat("A", 86))
	asked := &mautrix.ReqQueryKeys{DeviceKeys: mautrix.DeviceKeysRequest{userID: {"BROKEN", "OTHER", "NONE"}, "@nobody:test": {}}}
	answer := &keyQuery{DeviceKeys: map[id.UserID]map[id.DeviceID]json.RawMessage{userID: {"BROKEN": rawJSON(broken), "OTHER": rawJSON(other), "NONE": []byte("null")}}}
	users := must(w.hook.checkPublished(t.Context(), asked, answer))
	if len(users) != 1 || len(users[0].devices) != 3 {
		t.Fatalf("checked were %+v", users)
	}
	if err := w.hook.learn(t.Context(), func(ctx context.Context) error { return w.hook.storePublished(ctx, users, answer) }); err != nil {
		t.Fatal(err)
	}
	var stored []id.DeviceID
	for _, device := range must(w.hook.User(t.Context(), userID)).Devices {
		stored = append(stored, device.DeviceID)
	}
	if !slices.Equal(stored, []id.DeviceID{"ALICE", "OTHER"}) {
		t.Errorf("stored are %v", stored)
	}
}
