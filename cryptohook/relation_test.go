package cryptohook

import (
	"reflect"
	"testing"

	"maunium.net/go/mautrix/id"
)

// What a message replaces or answers is what everybody sees, whatever is said inside.
func TestRelationIsTheOneOutside(t *testing.T) {
	replaces := object{"rel_type": "m.replace", "event_id": "$original"}
	inThread := object{"rel_type": "m.thread", "event_id": "$root"}
	for name, tc := range map[string]struct{ outside, inside, want any }{
		"both the same":       {replaces, replaces, replaces},
		"outside only":        {replaces, nil, replaces},
		"inside only":         {nil, replaces, nil},
		"an edit to others":   {replaces, inThread, replaces},
		"an edit to the bot":  {inThread, replaces, inThread},
		"an empty one inside": {replaces, object{}, replaces},
		"none":                {nil, nil, nil},
		"junk inside":         {nil, []any{"x"}, nil},
		"junk outside":        {"junk", replaces, "junk"},
		"junk on both sides":  {"junk", []any{"x"}, "junk"},
	} {
		t.Run(name, func(t *testing.T) {
			w, alice, _ := twoPeople(t)
			s := newMegolm(trustRoom)
			w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
			content := object{"msgtype": "m.text", "body": "hello"}
			if tc.inside != nil {
				content[relationKey] = tc.inside
			}
			encrypted := object{
				"algorithm": string(id.AlgorithmMegolmV1), "session_id": s.id().String(),
				"ciphertext": string(must(s.outbound.Encrypt(rawJSON(object{"room_id": s.roomID.String(), "type": "m.room.message", "content": content})))),
			}
			if tc.outside != nil {
				encrypted[relationKey] = tc.outside
			}
			seen := w.judgeNow(w.roomEvent(alice.owner.userID, "m.room.encrypted", encrypted))
			if seen.verdict.Code == CodeUnableToDecrypt && tc.outside == "junk" {
				return // what is not an event at all is not decrypted
			}
			wantCode(t, seen, CodeUnverifiedIdentity)
			if got := seen.evt.Content.Raw[relationKey]; !reflect.DeepEqual(got, tc.want) {
				t.Errorf("the relation is %v", got)
			}
			wanted, _ := tc.want.(object)
			if relation := seen.evt.Content.AsMessage().RelatesTo; (wanted["rel_type"] == "m.replace") != (relation.GetReplaceID() == "$original") {
				t.Errorf("read as %+v", relation)
			}
			if seen.body != "hello" {
				t.Errorf("read %q", seen.body)
			}
		})
	}
}
